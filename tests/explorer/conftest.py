"""A small real model with a real tokenizer, its atlas, the explorer of it on a real server, and a real browser."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import atlas_factory

from neuropil.atlas import Atlas
from neuropil.explorer import create_app
from neuropil.models import ImageInput, Model, load

EVIL = "<script>document.title='owned'</script>"
IMAGE = '"><img src=x onerror="document.title=\'owned\'">'
CORPUS = [
    "The dog chased the cat across the garden, and the bird sang in the old tree.",
    "In France they say that a good friend is worth more than money.",
    "My favourite animal is the horse. What is yours? A small green frog, perhaps.",
]
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def tiny_llama(folder: Path) -> Path:
    """A random Llama of three layers with a byte-level tokenizer and a chat template, saved to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=3,
        intermediate_size=24,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evil_columns(site: Any) -> dict[str, Any]:
    """The factory's columns, with markup where a vocabulary could hold it."""
    columns = atlas_factory.decode_columns(site)
    if site.number == 0:
        columns["label_sign"][0] = 1
        columns["label"][1] = EVIL
        columns["up_tokens"][1][0], columns["down_tokens"][1][0] = EVIL, IMAGE
    return columns


def build(path: Path, model: Any, causal: bool = True) -> Path:
    with Atlas.create(path, model) as atlas:
        settings = {"which": ["up", "gate", "down"], "top_k": 5}
        atlas.add("decode", evil_columns, settings=settings, types=atlas_factory.TYPES, progress=False)
        if causal:
            atlas.add("causal", atlas_factory.causal_columns, settings={"prompts": 16}, progress=False)
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Model:
    return load(model_folder)


@pytest.fixture(scope="session")
def atlas_path(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    return build(tmp_path_factory.mktemp("atlas") / "tiny", model)


EVIL_NAME = '"><svg onload="document.title=\'owned\'">.png'


def seen_columns(site: Any) -> dict[str, Any]:
    """What other commands add to a vision atlas: a description and a brick, with markup where someone may put it."""
    said = [f"sleeves and edges {i % 3}" for i in range(site.width)]
    if site.number == 0:
        said[1] = EVIL
    return {
        "description": said,
        "description_score": [float(i) / 4 for i in range(site.width)],
    }


def brick_columns(site: Any) -> dict[str, Any]:
    bricks = [i * 4 // site.width for i in range(site.width)]
    serves = {0: "footwear", 1: EVIL}
    return {"brick": bricks, "brick_function": [serves.get(b) if site.number else None for b in bricks]}


@pytest.fixture(scope="session")
def seeing() -> Model:
    """A small network that was shown some clothes, or digits where Fashion-MNIST is not installed."""
    from neuropil.data import image_set
    from neuropil.errors import MissingAsset

    try:
        images = image_set("fashion-mnist")
    except MissingAsset:
        images = image_set("digits")
    side = images.train_x.shape[-1]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 12, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(12 * (side // 4) ** 2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for x, y in zip(images.train_x[:6400].split(64), images.train_y[:6400].split(64), strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():  # a dead neuron
        net[3].weight[5], net[3].bias[5] = 0.0, -1.0
    net.eval()
    model = load(net)
    model.name = "clothes"
    model.image_input = ImageInput(1, (side, side))
    return model


@pytest.fixture(scope="session")
def seen_path(tmp_path_factory: pytest.TempPathFactory, seeing: Model) -> Path:
    import pyarrow as pa

    from neuropil.build import build_atlas
    from neuropil.data import Probe, probe

    assert seeing.image_input is not None
    assert seeing.image_input.size is not None
    side = seeing.image_input.size[0]
    images = probe("fashion-mnist" if side == 28 else "digits", 1, (side, side), limit=200)
    names = (EVIL_NAME, *images.names[1:])
    path = tmp_path_factory.mktemp("atlas") / "clothes"
    shown = Probe(images.name, images.pixels, names, images.labels, images.classes)
    build_atlas(seeing, path, progress=False, images=shown)
    with Atlas.open(path, write=True) as atlas:
        atlas.add("milan", seen_columns, progress=False)
        types = {"brick": pa.int32(), "brick_function": pa.string()}
        atlas.add("bricks", brick_columns, types=types, progress=False)
    return path


@pytest.fixture(scope="session")
def vision(seen_path: Path) -> Iterator["Serving"]:
    """The explorer of a vision atlas whose model is not to be had: pictures and diagram come from the atlas alone."""
    serving = Serving(create_app(seen_path, model="/nowhere/to/be/found"))
    yield serving
    serving.stop()


class Serving:
    """A uvicorn server in a thread, on a port that was free."""

    def __init__(self, app: Any) -> None:
        import uvicorn

        self.app = app
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture(scope="session")
def server(atlas_path: Path) -> Iterator[Serving]:
    serving = Serving(create_app(atlas_path))
    yield serving
    serving.stop()


@pytest.fixture(scope="session")
def modelless(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Iterator[Serving]:
    """An explorer whose model is not to be had, of an atlas without causal columns."""
    folder = tmp_path_factory.mktemp("atlas") / "bare"
    serving = Serving(create_app(build(folder, model, causal=False), model="/nowhere/to/be/found.gguf"))
    yield serving
    serving.stop()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = Path("/usr/bin/chromium")
    if not path.exists():
        pytest.skip("no /usr/bin/chromium; install the Debian package chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(path), args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, server: Serving) -> Iterator[Callable[..., Any]]:
    """`visit(path, phone=False, dark=False)` -> a page. Afterwards: no complaint in any console, nobody else asked."""
    complaints: list[str] = []
    foreign: list[str] = []
    contexts = []

    def open_page(path: str, phone: bool = False, dark: bool = False, at: Serving = server) -> Any:
        context = chromium.new_context(
            viewport={"width": 390, "height": 844} if phone else {"width": 1280, "height": 800},
            color_scheme="dark" if dark else "light",
            has_touch=phone,
            is_mobile=phone,
        )
        contexts.append(context)
        own = urlsplit(at.url).netloc

        def watch(route: Any) -> None:
            if urlsplit(route.request.url).netloc != own:
                foreign.append(route.request.url)
                route.abort()
            else:
                route.continue_()

        context.route("**/*", watch)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda m: complaints.append(m.text) if m.type in {"error", "warning"} else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(at.url + path)
        return page

    open_page.complaints = complaints  # type: ignore[attr-defined]
    yield open_page
    for context in contexts:
        context.close()
    assert foreign == []
    assert complaints == []
