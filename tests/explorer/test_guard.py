"""Who may ask, and what a page may do."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from neuropil.errors import AtlasError
from neuropil.explorer import create_app
from neuropil.explorer.guard import host_name


@pytest.fixture(scope="module")
def client(atlas_path: Path) -> TestClient:
    return TestClient(create_app(atlas_path), base_url="http://127.0.0.1:8000")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000"])
def test_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/sql", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", "", "["]
)
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 400
    assert "neuron" not in answer.text


def test_a_name_can_be_allowed(atlas_path: Path) -> None:
    named = TestClient(create_app(atlas_path, hosts=["atlas.lan"]))
    assert named.get("/sql", headers={"host": "atlas.lan:80"}).status_code == 200
    assert named.get("/sql", headers={"host": "other.lan"}).status_code == 400
    anyone = TestClient(create_app(atlas_path, hosts=["*"]))
    assert anyone.get("/sql", headers={"host": "other.lan"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/map", "/nowhere", "/static/style.css", "/map/values?column=effect"])
def test_every_answer_is_strict(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert all(policy[k] == "'self'" for k in ("script-src", "style-src", "img-src", "connect-src", "form-action"))
    assert headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"},
     {"origin": "http://127.0.0.1:9999"}],
)  # fmt: skip
def test_other_sites_cannot_make_it_work(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/neuron/0:0/fires", data={"text": "x"}, headers=headers).status_code == 403
    assert client.post("/model", headers=headers).status_code == 403
    assert client.app.state.live.status.state == "idle"  # type: ignore[attr-defined]


def test_large_bodies_are_refused(client: TestClient) -> None:
    assert client.post("/neuron/0:0/fires", data={"text": "x" * 100_000}).status_code == 413
    unsized = client.post("/playground/run", content=iter([b"{}"]))
    assert unsized.status_code == 413


@pytest.mark.parametrize("path", ["/playground/run", "/neuron/0:0/fires"])
def test_what_works_the_model_is_no_get(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 405
    assert client.app.state.live.status.state == "idle"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change", [{"clamps": {"0:0": 1e9}}, {"clamps": {"0:0": None}}, {"tokens": 0}, {"tokens": 10**6},
               {"where": "weights"}, {"temperature": -1}, {"prompt": "x" * 9000}],
)  # fmt: skip
def test_bad_runs_are_refused(client: TestClient, change: dict[str, object]) -> None:
    body = {"prompt": "x", "clamps": {}} | change
    assert client.post("/playground/run", json=body).status_code == 422


def test_files_cannot_be_reached(client: TestClient) -> None:
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2f..%2fatlas.py", "/download/exe"):
        assert client.get(path).status_code in {404, 422}


def test_a_folder_that_is_no_atlas(tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="no atlas"):
        create_app(tmp_path)


@pytest.mark.parametrize("host", ["a:b:c", "[x", "//", "a b", "\u2100.c", "[::1"])
def test_host_name_never_raises(host: str) -> None:
    assert host_name(host) not in {"127.0.0.1", "localhost", "::1"}
