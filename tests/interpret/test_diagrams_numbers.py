"""What diagrams compute, against PyTorch: values, gradients, operations, parameters, memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neuropil.interpret.diagrams import (
    Window,
    batch_norm,
    box,
    build,
    concat,
    constant,
    conv,
    conv_transpose,
    einsum,
    elementwise,
    embedding,
    layer_norm,
    linear,
    maximum,
    mean,
    merge,
    mul,
    pick,
    relu,
    rename,
    scale,
    softmax,
    split,
    tanh,
    total,
    transpose,
)
from neuropil.interpret.diagrams import architectures as shipped
from neuropil.interpret.diagrams.axes import symbol
from neuropil.interpret.diagrams.construct import of
from neuropil.interpret.diagrams.core import Diagram
from neuropil.interpret.diagrams.functions import FUNCTIONS, arguments
from neuropil.interpret.diagrams.reverse import saved
from neuropil.interpret.diagrams.run import weights_of

SMALL: dict[str, Callable[[], Diagram]] = {
    **shipped.SMALL,
    "masked attention": lambda: shipped.attention(masked=True).sized(y=3, x=3, k=2, h=2),
}


@functools.cache
def small(name: str) -> Diagram:
    return SMALL[name]()


def drawn(diagram: Diagram, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(a.shape, generator=generator, dtype=torch.float64)
        if a.dtype == "float"
        else torch.randint(2, a.shape, generator=generator)
        for a in diagram.dom
    ]


# -------------------------------------------------------------------------------------------------------- 8: values


def test_attention_is_that_of_torch() -> None:
    q, k, v = torch.randn(20, 16, 4), torch.randn(22, 16, 4), torch.randn(22, 16, 4)
    found = shipped.attention()(q, k, v)
    wanted = F.scaled_dot_product_attention(*(x.permute(2, 0, 1) for x in (q, k, v))).permute(1, 2, 0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    weights = einsum("y k h, x k h -> y x h") >> softmax("x")  # over x, not over y
    torch.testing.assert_close(weights(q, k).sum(1), torch.ones(20, 4))


def test_causal_attention_is_that_of_torch() -> None:
    q, k, v = (torch.randn(6, 4, 2) for _ in range(3))
    found = shipped.attention(masked=True)(q, k, v)
    heads = [x.permute(2, 0, 1) for x in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*heads, is_causal=True).permute(1, 2, 0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_multi_head_attention_is_that_of_torch() -> None:
    y, x, m, h = 20, 22, 128, 4
    k = m // h  # torch's heads share the width out
    torch.manual_seed(0)
    module = nn.MultiheadAttention(m, h, bias=False, batch_first=True)
    net = shipped.multi_head_attention(m, k, h).torch()
    with torch.no_grad():
        for name, part in zip("qkv", module.in_proj_weight.chunk(3), strict=True):
            net.value_of(f"{name}.weight").copy_(part.view(h, k, m).transpose(0, 1))  # torch counts heads first
        net.value_of("o.weight").copy_(module.out_proj.weight.view(m, h, k).transpose(1, 2))
        queries, others = torch.randn(y, m), torch.randn(x, m)
        wanted = module(queries[None], others[None], others[None])[0][0]
        torch.testing.assert_close(net(queries, others), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_is_that_of_torch(stride: int, dilation: int, padding: int) -> None:
    net = shipped.convolution(stride, padding, dilation).torch()
    image = torch.randn(3, 9, 8)
    wanted = F.conv2d(image[None], net.value_of("conv.weight"), net.value_of("conv.bias"), stride, padding, dilation)[0]
    torch.testing.assert_close(net(image), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 0, 1), (2, 0, 2)])
def test_transposed_convolution(stride: int, padding: int, dilation: int) -> None:
    """Torch's, and the adjoint of the convolution with the same weight."""
    windows = {"x": Window("w", 3, stride, padding, dilation)}
    back = conv_transpose("d -> c=2", "t", windows, bias=False).on("d=4 x=5").torch().double()
    small = torch.randn(4, 5, dtype=torch.float64)
    weight = back.value_of("t.weight").detach()
    found = back(small)
    wanted = F.conv_transpose1d(small[None], weight, None, stride, padding, dilation=dilation)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    wide = torch.randn(2, found.shape[1], dtype=torch.float64)
    size = f"c=2 w={found.shape[1]}"
    forth = conv("c -> d=4", "f", {"w": Window("x", 3, stride, padding, dilation)}, bias=False).on(size)
    made = forth.torch({"f.weight": weight})(wide)
    torch.testing.assert_close((made * small).sum(), (wide * found).sum(), rtol=0, atol=1e-5)


def test_residual_network_runs_on_a_batch() -> None:
    net = shipped.resnet().lift("b", at=0).torch()
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    one = shipped.resnet(8, 4, (8, 16), 1)
    alone = one.torch()
    weights = dict(alone.named_parameters()) | dict(alone.named_buffers())
    many = one.lift("b", at=0).torch(weights)
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(many(images), torch.stack([alone(x) for x in images]), rtol=0, atol=1e-5)


def test_the_perceptron_is_that_of_torch() -> None:
    net = shipped.mlp().torch()
    image = torch.randn(28, 28)
    x = image.flatten()
    for name in ("first", "second"):
        x = F.relu(F.linear(x, net.value_of(f"{name}.weight"), net.value_of(f"{name}.bias")))
    wanted = F.linear(x, net.value_of("out.weight"), net.value_of("out.bias")).softmax(0)
    torch.testing.assert_close(net(image), wanted, rtol=0, atol=1e-6)


def test_norms_are_those_of_torch() -> None:
    x = torch.randn(4, 6)
    net = layer_norm("m").on("s=4 m=6").torch()
    torch.testing.assert_close(net(x), F.layer_norm(x, (6,)), rtol=0, atol=1e-5)
    norm = nn.BatchNorm1d(6).eval()
    norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) + 0.5
    made = batch_norm("m").on("s=4 m=6").torch({f"norm.{k}": v for k, v in norm.state_dict().items()})
    torch.testing.assert_close(made(x), norm(x), rtol=0, atol=1e-5)


def test_heads_are_laid_out_as_said() -> None:
    x = torch.arange(6.0)
    assert torch.equal(split("m -> h=2 k=3").on("m=6")(x), x.view(2, 3))
    assert torch.equal((split("m -> k=3 h=2").on("m=6") >> transpose("h k"))(x), x.view(3, 2).T)
    both = split("m -> h=2 k=3").on("m=6") >> merge("h k -> m")
    assert torch.equal(both(x), x)
    other = split("m -> h=2 k=3").on("m=6") >> merge("k h -> m")
    assert torch.equal(other(x), x.view(2, 3).T.flatten())


def test_weights_are_shared_by_name_and_live_in_the_state() -> None:
    once = linear("a -> b=3", "w", bias=False)
    twice = build("a=3", lambda x: once(rename(b="a")(once(x))))
    net = twice.torch(seed=1)
    assert [name for name, _ in net.named_parameters()] == ["w.weight"]
    x, w = torch.randn(3), net.value_of("w.weight")
    torch.testing.assert_close(net(x), w @ (w @ x))
    other = twice.torch(seed=2)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    with pytest.raises(ValueError, match="of shape"):
        twice.torch({"w.weight": torch.ones(2, 2)})


# -------------------------------------------------------------------------------------------------------- 9: gradients


def gradients_agree(diagram: Diagram, seed: int = 0) -> None:
    """The reverse diagram and autograd in double precision, for all inputs and weights."""
    net = diagram.torch(seed=seed).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    inputs = drawn(diagram, seed)
    floats = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    outs = net(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype) for y in outs]
    found_weights = weights_of(diagram.flat())
    names = [n for n, op in found_weights.items() if op.option("trainable", True)]
    leaves = [*floats, *(net.value_of(n) for n in names)]
    right = torch.autograd.grad(outs, leaves, wanted, allow_unused=True)
    right = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, right, strict=True)]
    back = diagram.backward()
    run = back.torch({n: net.value_of(n).detach() for n in found_weights})
    with torch.no_grad():
        made = run(*(x.detach() for x in inputs), *wanted)
    made = made if isinstance(made, tuple) else (made,)
    assert len(made) == len(right)
    for a, b in zip(made, right, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_architectures(name: str) -> None:
    gradients_agree(small(name))


def positive(x: Any) -> Any:
    return elementwise("shift", 0.5)(elementwise("square")(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_functions(name: str) -> None:
    number = 0.7 if name in ("scale", "shift") else None
    if arguments(name) == 2:
        gradients_agree(build("a=3 b=2, b=2", lambda x, y: elementwise(name)(x, positive(y))))
        gradients_agree(build("b=2, a=3 b=2", lambda x, y: elementwise(name)(x, positive(y))))
    else:
        gradients_agree(build("a=3 b=2", lambda x: elementwise(name, number)(positive(x))))


PRIMITIVES: dict[str, Callable[[], Diagram]] = {
    "sum": lambda: total("a").on("a=3 b=2"),
    "mean": lambda: mean("a b").on("a=3 b=2 c=2"),
    "outer product": lambda: einsum("a=3, b=2 -> b a"),
    "diagonal": lambda: einsum("a=3 b=2, a=3 -> a b"),
    "three factors": lambda: einsum("a=3 b=2, b=2 c=4, c=4 -> a"),
    "square of one array": lambda: build("a=3", lambda x: einsum("a, a -> 1")(x, x)),
    "softmax": lambda: softmax("b").on("a=3 b=4 c=2"),
    "maximum": lambda: maximum("b").on("a=3 b=4 c=2"),
    "rename": lambda: rename(a="z").on("a=3 b=2"),
    "split": lambda: split("m -> a=3 b=2").on("c=2 m=6"),
    "merge": lambda: merge("b a -> m").on("a=3 c=2 b=2"),
    "pick": lambda: pick("a", 1).on("a=3 b=2"),
    "concat": lambda: build("a=2 b=3, a=2 c=4", lambda x, y: concat("d")(x, y)),
    "embedding": lambda: embedding("v=5 -> m=3", "t").on("int: s=4") >> tanh,
    "copy": lambda: build("a=3", lambda x: (mul(x, x), x)),
    "unused": lambda: build("a=3, b=2", lambda x, y: relu(x)),
    "box": lambda: box("f", "a=3, b=2 -> a=3", lambda x, y: x.sin() * y.sum()).lift("c=4", carried=(True, False)),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_gradients_of_primitives(name: str) -> None:
    gradients_agree(PRIMITIVES[name]())


@pytest.mark.parametrize("name", ["rename", "split", "merge", "pick"])
def test_a_linear_map_reversed_twice_is_itself(name: str) -> None:
    diagram = PRIMITIVES[name]()
    once = diagram.backward()
    assert len(once.steps) == 1  # reads no value: the input is only deleted
    step = once.steps[0]
    assert step.ins == (len(diagram.inputs),)
    again = of(step.op).backward()
    assert again.steps[0].op == diagram.steps[0].op


def test_backward_costs_about_twice_the_forward_pass() -> None:
    for diagram in (shipped.mlp(5, 12, 4), shipped.attention().sized(y=3, x=4, k=2, h=3)):
        forward, both = diagram.cost().matmul, diagram.backward().cost().matmul
        again = diagram.cost().matmul  # the backward diagram carries the forward steps it reads
        assert 2 * forward <= both <= 2 * forward + again


# -------------------------------------------------------------------------------------------------------- 10, 11: costs


@pytest.mark.parametrize("name", SMALL)
def test_operations_and_parameters_are_those_counted(name: str) -> None:
    diagram = small(name)
    net = diagram.torch()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(*(x.float() for x in drawn(diagram)))
    cost = diagram.cost()
    assert cost.matmul == counter.get_total_flops()
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    assert cost.flops >= cost.matmul


def test_convolution_costs_as_the_library_counts() -> None:
    with FlopCounterMode(display=False) as counter:
        F.conv2d(torch.randn(1, 3, 9, 8), torch.randn(4, 3, 3, 3), None, 2, 1)
    assert shipped.convolution(2, 1).cost().matmul == counter.get_total_flops()


def test_costs_of_attention_are_polynomials() -> None:
    y, x, k, h = map(symbol, "yxkh")
    cost = shipped.attention().cost()
    assert sympy.expand(cost.matmul - 4 * y * x * k * h) == 0
    scores = [a for a in shipped.attention().flat().wires if a.names == ("y", "x", "h")]
    assert all(a.numel == y * x * h for a in scores)
    assert any(sympy.expand(cut - (y * x * h + x * k * h)) == 0 for cut in cost.cuts)
    sizes = {"y": 3, "x": 4, "k": 2, "h": 5}
    numbers = shipped.attention().cost(**sizes)
    bound = {symbol(name): size for name, size in sizes.items()}
    assert numbers.matmul == cost.matmul.subs(bound)
    assert numbers.flops == cost.flops.subs(bound)
    assert numbers.peak == cost.peak.subs(bound)
    assert numbers.training == cost.training.subs(bound)
    assert [c.subs(bound) for c in cost.cuts] == list(numbers.cuts)


def test_memory_of_training_is_what_autograd_keeps() -> None:
    """Every array that autograd keeps, once, weights and the masks of ReLU aside; see the comments."""
    diagram = shipped.mlp(5, 12, 4)
    kept: dict[int, int] = {}
    x = torch.randn(5, 5)
    net = diagram.torch()
    known = {p.untyped_storage()._cdata for p in net.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in known:
            kept[t.untyped_storage()._cdata] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x)
    # Autograd: the flat image, the value of each ReLU (which is also what the next product reads), the softmax's value.
    # The diagram: the same, but a ReLU's slope reads its argument, one array more for each of the two.
    assert sum(kept.values()) == 25 + 12 + 12 + 4
    assert out.shape == (4,)
    names = [a.names for a in saved(diagram)]
    assert names == [("p",), ("a",), ("a",), ("b",), ("b",), ("c",)]
    assert diagram.cost().training == sum(kept.values()) + 12 + 12


def test_a_linear_map_keeps_nothing() -> None:
    assert saved(split("m -> a=3 b=2").on("m=6") >> transpose("b a") >> scale(3)) == []


def test_peak_is_the_widest_cut() -> None:
    diagram = build(
        "a=2 b=3", lambda x: total("a b c")(einsum("a b, c=5 -> a b c")(x, x.beside(constant("full", "c=5", 1.0))))
    )
    assert diagram.cost().cuts == (6, 30, 1)
    assert diagram.cost().peak == 30
