"""Circuit diagrams of modules: they compute what the module does, with its shapes, its tree and its weights."""

from __future__ import annotations

import copy
import functools
import json
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_cli import run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neuropil.errors import ModelError
from neuropil.interpret.diagrams import DiagramError, circuit_diagram
from neuropil.interpret.diagrams.core import Diagram
from neuropil.interpret.diagrams.fold import folded


class Residual(nn.Module):
    """A block of a residual network, with everything that makes tracing hard put in place."""

    def __init__(self, old: int, new: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(old, new, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(new)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(new, new, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(new)
        self.down = nn.Conv2d(old, new, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


def resnet() -> tuple[nn.Module, Any]:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8, 8, 1), Residual(8, 8, 1), Residual(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    return net, torch.randn(2, 3, 8, 8)


def llama() -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), torch.arange(10).view(2, 5)


def vit() -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), torch.randn(2, 3, 16, 16)


def swin() -> tuple[nn.Module, Any]:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.SwinForImageClassification(config), torch.randn(1, 3, 32, 32)


def mlp() -> tuple[nn.Module, Any]:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(4, 6)


MODELS = {make.__name__: make for make in (mlp, resnet, llama, vit, swin)}


def answer(module: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        found = module.eval()(example)
    return found if isinstance(found, Tensor) else found.logits


@functools.cache
def circuit_of(name: str) -> tuple[nn.Module, Any, Any]:
    """A model, what it was traced on, and its diagram; the model is left as it was."""
    torch.manual_seed(0)
    module, example = MODELS[name]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        circuit = circuit_diagram(module, example)
    assert all(m.training for m in module.modules()), "the mode was changed"
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any("forward" in vars(m) for m in module.modules())
    return module, example, circuit


@pytest.fixture(params=MODELS)
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Any]:
    return circuit_of(request.param)


def test_it_computes_what_the_module_does(traced: tuple[nn.Module, Any, Any]) -> None:
    module, example, circuit = traced
    with torch.no_grad():
        found = circuit.torch()(example)
    torch.testing.assert_close(found, answer(module, example), rtol=0, atol=0)
    other = torch.randn_like(example) if example.is_floating_point() else example.flip(1)
    with torch.no_grad():
        torch.testing.assert_close(circuit.torch()(other), answer(module, other), rtol=1e-5, atol=1e-6)


def test_shapes_are_those_that_hooks_see(traced: tuple[nn.Module, Any, Any]) -> None:
    module, example, circuit = traced
    seen: dict[str, tuple[int, ...]] = {}

    def hook(name: str) -> Any:
        def note(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                seen.setdefault(name, tuple(out.shape))

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in module.named_modules()]
    answer(module, example)
    for handle in handles:
        handle.remove()
    compared = [name for name in circuit.modules if name in seen]
    assert len(compared) >= 3
    for name in compared:
        assert circuit.modules[name] == (seen[name],), name


def test_blocks_are_the_tree_of_modules(traced: tuple[nn.Module, Any, Any]) -> None:
    module, _, circuit = traced
    names = {name for name, _ in module.named_modules()}
    assert {name.partition("@")[0] for name in circuit.modules} <= names
    weighted = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm)]
    assert set(weighted) <= set(circuit.modules)


def test_costs_are_those_counted(traced: tuple[nn.Module, Any, Any]) -> None:
    module, example, circuit = traced
    with FlopCounterMode(display=False) as counter:
        answer(module, example)
    cost = circuit.cost()
    assert cost.matmul == counter.get_total_flops()
    used = {name for name, op in circuit.torch().named_parameters()}
    assert cost.parameters == sum(p.numel() for name, p in module.named_parameters() if name in used)
    assert circuit.theory.tolist() == circuit.simulated.tolist()


def test_drawings_and_files(traced: tuple[nn.Module, Any, Any]) -> None:
    _, _, circuit = traced
    ET.fromstring(circuit.svg(depth=1))
    text = circuit.svg(depth=3)
    assert text == circuit.svg(depth=3)
    ET.fromstring(text)
    assert 'data-module="' in text
    again = Diagram.from_json(circuit.diagram.to_json())
    assert again == circuit.diagram
    circuit.mermaid()
    circuit.tikz()


def test_equal_layers_are_folded() -> None:
    _, _, circuit = circuit_of("llama")
    model = folded(circuit.diagram).steps[0].op.body
    assert model is not None
    assert [s.op.option("repeat") for s in model.steps if s.op.name.startswith("layers")] == [3]
    assert "×3" in circuit.svg(depth=2)
    assert 'data-module="model.layers.1.mlp"' in circuit.svg(depth=3, fold=False)


def test_gradients_through_a_traced_module() -> None:
    torch.manual_seed(0)
    module, example = mlp()
    module.eval().double()
    x = example.double().requires_grad_()
    circuit = circuit_diagram(module, x.detach())
    out = module(x)
    wanted = torch.randn_like(out)
    right = torch.autograd.grad(out, [x, *module.parameters()], wanted)
    back = circuit.backward().torch(dict(module.named_parameters()))
    with torch.no_grad():
        made = back(x.detach(), wanted)
    for a, b in zip(made, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_axes_are_named() -> None:
    module, example = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 7)), torch.arange(10).view(2, 5)
    circuit = circuit_diagram(module, example, names=["sentence word"])
    assert str(circuit.diagram) == "int: sentence=2 word=5 -> sentence=2 word=5 d7=7"
    assert circuit.diagram.steps[0].op.cod[0].names == ("sentence", "word", "d16")
    with pytest.raises(DiagramError, match="names for 2 tensors"):
        circuit_diagram(module, example, names=["a b", "c"])
    with pytest.raises(DiagramError, match="of 2 dimensions"):
        circuit_diagram(module, example, names=["a b c"])
    with pytest.raises(DiagramError, match="'a' has size 2 in one tensor and 5 in another"):
        circuit_diagram(module, example, names=["a a"])


def test_a_padded_map_keeps_its_names_and_batch_norm_reads_channels() -> None:
    net = nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()).eval()
    circuit = circuit_diagram(net, torch.zeros(1, 3, 6, 8), names=["batch c h w"])
    blocks = [step.op for step in circuit.diagram.steps]
    assert [op.cod[0].names for op in blocks[:2]] == [("batch", "c", "h8", "w10"), ("batch", "c8", "h3", "w4")]
    assert blocks[2].body is not None
    [norm] = [step.op for step in blocks[2].body.steps if step.op.over]
    assert set(norm.over) == {"batch", "h3", "w4"}


def test_shared_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    module = Tied()
    ids = torch.tensor([[1, 2, 3]])
    circuit = circuit_diagram(module, ids)
    assert circuit.cost().parameters == 44
    assert torch.equal(circuit.torch()(ids), module(ids))


# -------------------------------------------------------------------------------------------------------- hard modules


class Branches(nn.Module):
    """Its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x) if float(x.sum()) > 0 else self.down(x)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(4, 4), Branches(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.odd(self.first(x)).relu())


def test_a_module_that_cannot_be_traced_is_one_opaque_box() -> None:
    torch.manual_seed(0)
    module, x = Around(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"^odd \(Branches\) is drawn as one opaque box: "):
        circuit = circuit_diagram(module, x)
    assert list(circuit.opaque) == ["odd"]
    assert set(circuit.modules) == {"first", "last"}
    for other in (x, -x, torch.randn(3, 4)):
        torch.testing.assert_close(circuit.torch()(other), module(other), rtol=0, atol=0)
    text = circuit.svg()
    assert 'class="np-opaque"' in text
    assert 'data-module="odd"' in text
    assert not any("forward" in vars(m) for m in module.modules()), "the module's own forward did not come back"


def test_a_model_that_is_itself_opaque() -> None:
    module, x = Branches(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"^Branches \(Branches\) is drawn as one opaque box"):
        circuit = circuit_diagram(module, x)
    assert list(circuit.opaque) == [""]
    assert torch.equal(circuit.torch()(-x), module(-x))
    assert "np-opaque" in circuit.svg()


class Several(nn.Module):
    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        a, b = x.chunk(2, dim=1)
        return {"sum": a + pair[0], "both": (b, torch.cat([a, b], 1).view(2, 2, 2)), "name": "no tensor"}


def test_tuples_in_and_out() -> None:
    module = Several()
    args = (torch.randn(2, 4), (torch.randn(2, 2), torch.randn(2, 2)))
    circuit = circuit_diagram(module, args)
    assert len(circuit.diagram.dom) == 3
    found = circuit.torch()(args[0], *args[1])
    wanted = module(*args)
    for a, b in zip(found, (wanted["sum"], *wanted["both"]), strict=True):
        assert torch.equal(a, b)


def test_errors_name_the_module() -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "words"

    with pytest.raises(DiagramError, match="Text gives str without a tensor"):
        circuit_diagram(Text(), torch.ones(1))
    with pytest.raises(DiagramError, match="Linear does not run on this example"):
        circuit_diagram(nn.Linear(3, 2), torch.ones(4))
    with pytest.raises(ModelError, match="no input could be made up"):
        circuit_diagram(Text())


def test_an_example_is_made_up() -> None:
    module, _ = mlp()
    assert circuit_diagram(module).diagram.cod[0].shape[-1] == 3
    words = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 7))
    assert circuit_diagram(words).diagram.dom[0].dtype == "int"


def test_a_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).tanh())

    module, x = Twice(), torch.randn(2, 4)
    circuit = circuit_diagram(module, x)
    assert torch.equal(circuit.torch()(x), module(x))
    assert circuit.cost().parameters == 20


def test_a_single_layer() -> None:
    """Whose weight is called `weight`, without a module around it."""
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert torch.equal(circuit_diagram(module, x).torch()(x), module(x))


def test_the_model_is_not_copied() -> None:
    module, example = mlp()
    circuit = circuit_diagram(module, example)
    assert circuit.torch().value_of("0.weight") is module.get_parameter("0.weight")
    other = copy.deepcopy(module)
    assert torch.equal(other.get_parameter("0.weight"), module.get_parameter("0.weight"))


# ------------------------------------------------------------------------------------------------------- command line

FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.conv(x).relu().mean((2, 3)))

def broken():
    return 3
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def test_command_line_writes(net: Path, tmp_path: Path) -> None:
    for suffix, begin in ((".svg", "<svg"), (".tex", r"\begin{tikzpicture}"), (".mmd", "flowchart"), (".txt", "From")):
        out = tmp_path / f"net{suffix}"
        done = run("diagram", f"{net}:Net", "--input", "1,3,8,8", "--out", out)
        assert done.exit_code == 0, done.stderr
        assert out.read_text().startswith(begin)
    done = run("diagram", f"{net}:Net", "--input", "1,3,8,8", "--json")
    facts = json.loads(done.stdout)
    assert facts["parameters"] == 4 * 27 + 4 + 8 + 2
    assert facts["operations_in_products"] == 2 * (64 * 4 * 27 + 8)
    assert facts["opaque"] == {}
    said = run("diagram", f"{net}:Net", "--input", "1,3,8,8", "--names", "picture c h w").stdout
    assert "conv (Conv2d): from picture=1 c=3 h=8 w=8" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{net}:Net", "--input", "1,x"), "expected sizes"),
        (("{net}:Net", "--out", "net.png"), "expected a name that ends in"),
        (("{net}:Nothing",), "has no Nothing"),
        (("{net}:broken",), "gives int"),
        (("nowhere.py:Net",), "there is no file nowhere.py"),
        (("{net}:Net", "--input", "1,7,8,8"), "does not run on this example"),
    ],
)
def test_command_line_refuses(net: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run("diagram", *(a.format(net=net) for a in arguments))
    assert done.exit_code != 0
    assert said in " ".join(done.stderr.replace("│", " ").split())
