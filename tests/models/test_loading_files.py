"""`FILE.py:NAME`: what a file makes is a model as any other; what is wrong with it is said in a sentence."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from test_cli import run, said_no_traceback
from torch import nn

from neuropil.atlas import Atlas
from neuropil.build import default_path
from neuropil.errors import AtlasError, ModelError
from neuropil.explorer import create_app
from neuropil.models import load

FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from beside import head
from neuropil.models import ImageInput, load

@dataclass
class Settings:
    width: int = 4

class Net(nn.Module):
    def __init__(self, settings=Settings()):
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, settings.width, 3), nn.Dropout()
        self.act, self.out = nn.ReLU(), head(settings.width)

    def forward(self, x):
        return self.out(self.drop(self.act(self.conv(x)).mean((2, 3))))

def changed():
    net = Net()
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] += 1
    return net

def shaped():
    model = load(Net())
    model.image_input = ImageInput(1, (8, 8), (0.3,), (0.2,))
    return model

ready = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
number = 3

def needs(width, depth=1):
    return Net(Settings(width))

def fails():
    raise ValueError("no weights here")

def leaves():
    raise SystemExit(2)

def here():
    return nn.Linear(*map(int, open("sizes.txt").read().split()))
"""


FAILS = FILE.splitlines().index('    raise ValueError("no weights here")') + 1


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one beside it that it imports, and the working folder."""
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine" / "nets.py"
    path.parent.mkdir()
    path.write_text(FILE)
    (path.parent / "beside.py").write_text("from torch import nn\n\ndef head(n):\n    return nn.Linear(n, 10)\n")
    return path


def test_what_a_file_makes_is_a_module_in_memory(nets: Path) -> None:
    before, modules = list(sys.path), dict(sys.modules)
    model = load(f"{nets}:Net")
    assert sys.path == before
    assert {name for name in modules if modules[name] is not sys.modules.get(name)} == set()
    assert (model.name, model.source, model.path) == ("Net", f"{nets}:Net", None)
    assert default_path(model) == Path("atlases/Net")
    module = model.module()
    assert type(module).__name__ == "Net"
    assert not any(m.training for m in module.modules())
    assert model.fingerprint == load(module).fingerprint
    assert [site.width for site in model.sites] == [4]
    assert not list(nets.parent.glob("__pycache__/nets*"))


def test_every_kind_of_name(nets: Path) -> None:
    assert isinstance(load(f"{nets}:ready").module(), nn.Sequential)
    shaped = load(f"{nets}:shaped")
    assert shaped.name == "shaped"
    assert shaped.image_input is not None
    assert (shaped.image_input.mean, shaped.image_input.size) == ((0.3,), (8, 8))
    assert not shaped.module().training
    words = object()
    assert load(f"{nets}:shaped", tokenizer=words).tokenizer is words
    assert load(f"{nets}:Net", tokenizer=words).tokenizer is words


def test_first_weights_are_the_same_each_time_and_others_are_noticed(nets: Path) -> None:
    state = torch.random.get_rng_state()
    torch.rand(7)
    first = load(f"{nets}:Net").fingerprint
    torch.rand(7)
    assert load(f"{nets}:Net").fingerprint == first == load(f"{nets}:shaped").fingerprint
    assert load(f"{nets}:changed").fingerprint != first
    torch.random.set_rng_state(state)


def test_an_edited_file_is_run_anew_with_what_is_beside_it(nets: Path) -> None:
    assert load(f"{nets}:Net").module().out.out_features == 10
    nets.write_text(FILE.replace("width: int = 4", "width: int = 6"))
    assert load(f"{nets}:Net").sites[0].width == 6
    other = nets.parent.parent / "other"
    other.mkdir()
    (other / "nets.py").write_text(FILE)
    (other / "beside.py").write_text("from torch import nn\n\ndef head(n):\n    return nn.Linear(n, 7)\n")
    assert load(f"{other}/nets.py:Net").module().out.out_features == 7


def test_paths_are_those_of_the_user(nets: Path, tmp_path: Path) -> None:
    (tmp_path / "sizes.txt").write_text("3 2")
    assert load("mine/nets.py:here").module().out_features == 2
    colon = tmp_path / "a:b.py:c"
    colon.mkdir()
    (colon / "n.py").write_text("from torch import nn\nnet = nn.Linear(2, 2)\n")
    assert load(f"{colon}/n.py:net").name == "net"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("mine/none.py:Net", r"there is no file mine/none.py; expected FILE.py:NAME"),
        ("mine/none.py", r"expected FILE.py:NAME"),
        ("mine/nets.py", r"expected mine/nets.py:NAME"),
        ("mine/nets.py:3", r"expected FILE.py:NAME"),
        ("mine/nets.py:Other", r"has no Other; .* it has Net, changed, shaped, ready, needs, fails, leaves, here$"),
        ("mine/nets.py:number", r"number is int; expected a torch.nn.Module, or what neuropil.models.load gives"),
        ("mine/nets.py:Settings", r"Settings gives Settings; expected a torch.nn.Module"),
        ("mine/nets.py:needs", r"needs arguments \(width\); write a function without arguments"),
        ("mine/nets.py:fails", rf"was called, and raised ValueError: no weights here \(.*nets.py, line {FAILS}\)"),
        ("mine/nets.py:leaves", r"was called, and raised SystemExit: 2"),
    ],
)
def test_what_is_wrong_is_said(nets: Path, source: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        load(source)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = x / 0\n", r"was run, and raised ZeroDivisionError: division by zero \(.*broken.py, line 2\)"),
        ("x = 1\ny = = 2\n", r"raised SyntaxError: invalid syntax \(.*broken.py, line 2\)"),
        ("import nowhere_to_be_found\n", r"raised ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("import worse\n", r"raised KeyError: 'a' \(.*worse.py, line 3\)"),
    ],
)
def test_a_file_that_fails_names_its_line(nets: Path, text: str, said: str) -> None:
    path, before = nets.parent / "broken.py", list(sys.path)
    path.write_text(text)
    (nets.parent / "worse.py").write_text("\n\n{}['a']\n")
    with pytest.raises(ModelError, match=said):
        load(f"{path}:Net")
    assert sys.path == before


def test_an_atlas_is_made_resumed_and_explored(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("atlas", "mine/nets.py:Net", "--images", "digits", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "atlases/Net"
    again = run("atlas", "mine/nets.py:Net", "--images", "digits")
    assert again.exit_code == 0, again.stderr
    assert "ablation 1), and is kept" in again.stderr
    other = run("atlas", "mine/nets.py:changed", "--images", "digits", "--out", "atlases/Net")
    assert "is the atlas of 'Net'" in said_no_traceback(other, AtlasError.exit_code).replace("\n", " ")
    with Atlas.open("atlases/Net") as atlas:
        assert atlas.manifest["model"]["source"] == "mine/nets.py:Net"
    with TestClient(create_app("atlases/Net")) as client:
        assert client.app.state.live.light().fingerprint == load("mine/nets.py:Net").fingerprint
    # Of an atlas from elsewhere no file is run: here, none was made of it.
    monkeypatch.setenv("NEUROPIL_CACHE", "elsewhere")
    with TestClient(create_app("atlases/Net")) as client:
        live = client.app.state.live
        assert live.light() is None
        assert "give --model mine/nets.py:Net" in live.status.message
    with TestClient(create_app("atlases/Net", model="mine/nets.py:Net")) as client:
        assert client.app.state.live.light() is not None


def test_commands_take_it(nets: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    done = run("compress", "mine/nets.py:shaped", "--method", "uniform", "--bits", 8, "--out", small)
    assert done.exit_code == 0, done.stderr
    assert f"load_packed({str(small)!r}, into=neuropil.models.load('mine/nets.py:shaped').module())" in done.stdout
    done = run("compress", "mine/nets.py:shaped", "--method", "neurons", "--sparsity", 0.5, "--json")
    assert json.loads(done.stdout)["changed"] > 0, done.stderr
    done = run("diagram", "mine/nets.py:shaped", "--input", "1,1,8,8", "--json")
    assert json.loads(done.stdout)["model"] == "shaped", done.stderr
    done = run("bricks", "mine/nets.py:Net", "--images", "digits", "--functions", "3,7", "--json")
    assert set(json.loads(done.stdout)["rise"]) == {"3", "7"}, done.stderr
    assert "needs arguments (width)" in said_no_traceback(run("clamp", "mine/nets.py:needs", "0:1=2", "-p", "x"), 3)
