"""The language of diagrams: its laws, its types and their errors, and what the drawing of it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from neuropil.interpret.diagrams import (
    Circuit,
    DiagramError,
    Polymorphic,
    Window,
    add,
    array,
    axis,
    block,
    box,
    build,
    circuit_diagram,
    concat,
    constant,
    conv,
    einsum,
    elementwise,
    embedding,
    gelu,
    identity,
    layer_norm,
    linear,
    maximum,
    mean,
    merge,
    mul,
    outer,
    pick,
    relu,
    rename,
    scale,
    softmax,
    split,
    sub,
    tanh,
    total,
    transpose,
    weight,
    wiring,
)
from neuropil.interpret.diagrams.axes import expression, symbol
from neuropil.interpret.diagrams.core import Diagram


def specimen(seed: int) -> Callable[[int], Circuit]:
    """What is read off the diagram of a convolutional network, and what is counted while it runs."""

    def run(seed: int) -> Circuit:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4 * 4, 10)
        )
        return circuit_diagram(net, torch.randn(2, 3, 8, 8))

    return run


def test_theory_is_what_is_counted() -> None:
    found = specimen(0)(0)
    assert found.theory.tolist() == found.simulated.tolist()
    assert len(found.theory) == 2 + 5
    assert found.theory[1] == 3 * 9 * 8 + 8 + 128 * 10 + 10


# ------------------------------------------------------------------------------------------------------- 1, 2: indices


def test_order_of_indices_does_not_matter() -> None:
    x = torch.randn(5, 7)
    for i in range(5):
        for j in range(7):
            one = (pick("a", i).on("a=5 b=7") >> pick("b", j))(x)
            other = (pick("b", j).on("a=5 b=7") >> pick("a", i))(x)
            assert torch.equal(one, other)
            assert torch.equal(one, x[i, j])
    assert torch.equal(pick("a", -1).on("a=5 b=7")(x), x[-1])
    with pytest.raises(DiagramError, match="5 elements"):
        pick("a", 5).on("a=5 b")


def functions(generator: torch.Generator) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """Twenty functions from an axis of 4 to one of 3, sums and maxima among them."""
    found: list[tuple[str, Callable[[Tensor], Tensor]]] = []
    for n in range(20):
        w = torch.randn(3, 4, generator=generator)
        kinds: list[Callable[[Tensor], Tensor]] = [
            lambda x, w=w: w @ x,
            lambda x, w=w: (w @ x).tanh(),
            lambda x, w=w: (w * x).amax(1),
            lambda x, w=w: (w + x).softmax(0).sum(1),
        ]
        found.append((f"g{n}", kinds[n % 4]))
    return found


@pytest.mark.parametrize(("name", "function"), functions(torch.Generator().manual_seed(0)), ids=lambda x: str(x)[:4])
def test_broadcasting_is_defined_by_indices(name: str, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5)
    lifted = box(name, "a=4 -> b=3", function).lift("c=5")
    assert str(lifted) == "a=4 c=5 -> b=3 c=5"
    loop = torch.stack([function(x[:, j]) for j in range(5)], 1)
    torch.testing.assert_close(lifted(x), loop, rtol=0, atol=1e-6)
    torch.testing.assert_close(lifted(x), torch.vmap(function, -1, -1)(x), rtol=0, atol=1e-6)


def test_inner_broadcasting() -> None:
    def function(x: Tensor, d: Tensor) -> Tensor:
        return torch.outer(x, d)[:, 0] * d.sum()

    h = box("h", "a=4, d=3 -> b=4", function)
    lifted = h.lift("c=6", carried=(True, False), at=0)
    assert str(lifted) == "c=6 a=4, d=3 -> c=6 b=4"
    x, d = torch.randn(6, 4), torch.randn(3)
    found = lifted(x, d)
    for i in range(6):
        torch.testing.assert_close(found[i], function(x[i], d), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, torch.vmap(function, (0, None), 0)(x, d), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------- 3, 4: laws of composition


def pieces() -> tuple[Diagram, Diagram, Diagram, Diagram]:
    return relu.on("a=3"), softmax("a").on("a=3"), tanh.on("b=2"), gelu.on("b=2")


def test_interchange() -> None:
    f, h, g, k = pieces()
    left, right = (f @ g) >> (h @ k), (f >> h) @ (g >> k)
    assert left == right
    assert hash(left) == hash(right)
    a, b = torch.randn(3), torch.randn(2)
    assert all(torch.equal(x, y) for x, y in zip(left(a, b), right(a, b), strict=True))
    assert left != (f @ k) >> (h @ g)


def test_identity_and_associativity() -> None:
    f, h, g, _ = pieces()
    assert identity("a=3") >> f == f == f >> identity("a=3")
    assert identity() @ f == f == f @ identity()
    assert (f >> h) >> f == f >> (h >> f)
    assert (f @ g) @ h == f @ (g @ h)


def test_symmetry_copies_and_deletes() -> None:
    f, _, g, _ = pieces()
    swap = wiring("a=3, b=2", (1, 0))
    assert swap >> wiring("b=2, a=3", (1, 0)) == identity("a=3, b=2")
    assert (f @ g) >> swap == swap >> (g @ f)
    copy = wiring("a=3", (0, 0))
    assert copy >> wiring("a=3, a=3", (1, 0)) == copy
    assert (copy >> wiring("a=3, a=3", (0,))) == identity("a=3")
    assert f >> wiring("a=3", ()) == wiring("a=3", ())  # what is never read is not there
    with pytest.raises(DiagramError, match="order"):
        wiring("a, b", (2,))


def test_broadcasting_is_a_functor() -> None:
    f, h, _, _ = pieces()
    assert (f >> h).lift("c") == f.lift("c") >> h.lift("c")
    assert identity("a=3").lift("c") == identity("a=3 c")
    g = linear("a -> b=2", "w").on("a=3")
    both = [g.lift(c).lift(d) for c, d in (("c=4", "d=5"), ("d=5", "c=4"))]
    x = torch.randn(3, 4, 5)
    one = both[0].torch()
    two = both[1].torch(dict(one.named_parameters()))
    torch.testing.assert_close(one(x), two(x.transpose(1, 2)).transpose(1, 2), rtol=0, atol=1e-6)
    with pytest.raises(DiagramError, match="rename"):
        f.lift("a")


# ------------------------------------------------------------------------------------------------ 5, 6: linear rewrites


def test_steps_of_attention_scores_are_one_einsum() -> None:
    y, x, k, h = 3, 5, 4, 2
    whole = einsum("y k h, x k h -> y x h")
    stepwise = build(
        "y k h, x k h",
        lambda q, key: total("k")(
            transpose("y x k h")(
                einsum("y k h, k x h -> y k x h")(q, transpose("k x h")(key)),
            )
        ),
    )
    q, key = torch.randn(y, k, h), torch.randn(x, k, h)
    torch.testing.assert_close(stepwise(q, key), whole(q, key), rtol=0, atol=1e-6)
    torch.testing.assert_close(whole(q, key), torch.einsum("ykh,xkh->yxh", q, key))
    sizes = {"y": y, "x": x, "k": k, "h": h}
    better = stepwise.simplified(**sizes)
    assert len(better.steps) == 1
    assert better == whole.sized(**sizes)


@pytest.mark.parametrize("seed", range(8))
def test_rewriting_keeps_the_value_and_never_costs_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (5,), generator=generator).tolist()
    axes = [f"a{n}={s}" for n, s in enumerate(sizes)]

    def chain(a: Any, b: Any, c: Any, d: Any) -> Any:
        ab = einsum(f"{axes[0]} {axes[1]}, {axes[1]} {axes[2]} -> {axes[0]} {axes[2]}")(a, b)
        abc = einsum(f"{axes[0]} {axes[2]}, {axes[2]} {axes[3]} -> {axes[3]} {axes[0]}")(ab, c)
        return einsum(f"{axes[3]} {axes[0]}, {axes[3]} {axes[4]} -> {axes[0]} {axes[4]}")(abc, d)

    diagram = build(", ".join(f"{axes[n]} {axes[n + 1]}" for n in range(4)), chain)
    better = diagram.simplified()
    inputs = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for a in diagram.dom]
    torch.testing.assert_close(better(*inputs), diagram(*inputs), rtol=1e-10, atol=1e-10)
    assert better.cost().flops <= diagram.cost().flops


def test_rewriting_keeps_apart_what_sums_over_one_name() -> None:
    """Both steps sum over an axis k, each over its own."""
    diagram = build(
        "a=2 k=3, k=3 b=4, b=4 k=3, k=3",
        lambda p, q, r, s: einsum("a b, b k, k -> a")(einsum("a k, k b -> a b")(p, q), r, s),
    )
    inputs = [torch.randn(a.shape, dtype=torch.float64) for a in diagram.dom]
    torch.testing.assert_close(diagram.simplified()(*inputs), diagram(*inputs))


def test_rewriting_needs_sizes() -> None:
    with pytest.raises(DiagramError, match="sizes of h, k, x, y"):
        einsum("y k h, x k h -> y x h").simplified()


def test_the_snake() -> None:
    x = torch.randn(4)
    snake = build(
        "a=4",
        lambda v: rename(b="a")(einsum("a b, a -> b")(v.beside(constant("eye", "a=4 b=4")), v)),
    )
    torch.testing.assert_close(snake(x), x, rtol=0, atol=1e-6)
    bent = build(
        "a=4",
        lambda v: einsum("a c, b c -> a b")(
            outer("a=4", "c=3")(v, v.beside(constant("full", "c=3", 1.0))),
            v.beside(constant("full", "b=2 c=3", 1.0)),
        ),
    )
    torch.testing.assert_close(bent(x), 3 * x[:, None].expand(4, 2), rtol=0, atol=1e-6)


def test_transposing_by_products_with_identities() -> None:
    x = torch.randn(3, 5)

    def by_outer(v: Any) -> Any:
        rows, columns = (v.beside(constant("eye", text)) for text in ("a=3 c=3", "b=5 d=5"))
        return einsum("a b, a c, b d -> d c")(v, rows, columns)

    found = build("a=3 b=5", by_outer)(x)
    torch.testing.assert_close(found, transpose("b a").on("a=3 b=5")(x), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- 7: types


def test_errors_name_both_axes_and_sizes() -> None:
    with pytest.raises(DiagramError, match=r"axis 'd' of size 4 where axis 'b' of size 5"):
        box("f", "a=3 -> d=4") >> box("g", "b=5 -> c=2")
    with pytest.raises(DiagramError, match=r"'b' has size 4 on the left and axis 'b' has size 5 on the right"):
        box("f", "a=3 -> b=4") >> box("g", "b=5 -> c=2")
    with pytest.raises(DiagramError, match="1 axes, expected"):
        box("f", "a -> b") >> box("g", "b c -> d")
    with pytest.raises(DiagramError, match="1 arrays"):
        box("f", "a -> b") >> box("g", "b, c -> d")
    with pytest.raises(DiagramError, match="of int, expected one of float"):
        identity("int: a") >> box("g", "a -> b")


def test_one_name_has_one_size_across_a_diagram() -> None:
    f = box("f", "a=3 -> b=4") >> box("g", "b=4 -> c=5")
    with pytest.raises(DiagramError, match="'a' has size"):
        f >> box("h", "c=5 -> a=6")
    with pytest.raises(DiagramError, match="axis 'a' has size 3"):
        f @ identity("a=7")
    with pytest.raises(DiagramError, match="size 3 in one place and 4 in another"):
        box("f", "a=3 -> a=4 b")


def test_free_sizes_are_learned_from_both_sides() -> None:
    made = box("f", "a -> b") >> box("g", "b=5 -> c")
    assert str(made) == "a -> c"
    assert made.sizes["b"] == 5
    assert str(made.sized(a=2)) == "a=2 -> c"
    with pytest.raises(DiagramError, match="no size of this diagram is called q"):
        made.sized(q=2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: einsum("a b -> a c"), "axis 'c', which no input has"),
        (lambda: einsum("a b"), "without an arrow"),
        (lambda: einsum("a -> a, a"), "one array after the arrow"),
        (lambda: array("a a"), "an axis twice"),
        (lambda: array("2a"), "expected a letter"),
        (lambda: array("bool: a"), "expected int or float"),
        (lambda: axis("a", -1), "number of elements"),
        (lambda: array("a=__import__('os')"), "expected numbers and names"),
        (lambda: softmax("z").on("a b"), "needs axis 'z'"),
        (lambda: linear("z -> y", "w").on("a b"), "needs axis 'z'"),
        (lambda: linear("a -> a", "w").on("a b"), "axis on both sides"),
        (lambda: mean("z").on("a"), "needs axis 'z'"),
        (lambda: transpose("a").on("a b"), "each of them once"),
        (lambda: add.on("a b", "c"), "axis 'c' is not in"),
        (lambda: add.on("a=2 b", "a=3"), "size 3 in one argument and 2 in another"),
        (lambda: add.on("a"), "takes 2 arrays"),
        (lambda: elementwise("sine"), "no function 'sine'"),
        (lambda: concat("c").on("a b", "c d"), "differ in one axis"),
        (lambda: constant("pi", "a"), "there are eye, causal, full"),
        (lambda: split("m -> h=3 k=2").on("m=7"), "of size 7 for parts of size 6"),
        (lambda: merge("h k -> m=7").on("h=3 k=2"), "of size 7 for parts of size 6"),
        (lambda: conv("c -> d", "w", {"x": Window("x", 3)}).on("c x=8"), "give the new axis another name"),
        (lambda: conv("c -> d", "w", {"x": Window("x1", 9)}).on("c x=8"), "does not fit"),
        (lambda: relu("a"), "say which"),
        (lambda: box("f", "a -> b").lift("c", carried=(True, True)), "2 entries for 1 inputs"),
        (lambda: identity("a")(1), "wires or with tensors"),
    ],
)
def test_what_is_wrong_is_said(wrong: Callable[[], Any], said: str) -> None:
    with pytest.raises(DiagramError, match=said):
        wrong()


def test_tensors_that_do_not_fit() -> None:
    f = einsum("a b, b c -> a c").sized(c=2)
    with pytest.raises(DiagramError, match="'b' has size 4 in one tensor and 5 in another"):
        f(torch.ones(3, 4), torch.ones(5, 2))
    with pytest.raises(DiagramError, match="'c' has size 3 in a tensor; the diagram says 2"):
        f(torch.ones(3, 4), torch.ones(4, 3))
    with pytest.raises(DiagramError, match="has 2 axes"):
        f(torch.ones(3), torch.ones(4, 2))
    with pytest.raises(DiagramError, match="1 tensors for a diagram of 2 inputs"):
        f(torch.ones(3, 4))
    with pytest.raises(DiagramError, match=r"unknown size m; say it, as .torch\(m=...\)"):
        linear("m -> n=3", "w").on("m").torch()
    with pytest.raises(DiagramError, match="has no function"):
        box("f", "a -> b")(torch.ones(2))
    with pytest.raises(DiagramError, match="two weights called 'w'"):
        build("a=2", lambda x: (mul(x, x), x.beside(weight("w", "a=2")),
                                x.beside(weight("w", "b=3")))).torch()  # fmt: skip


def test_expressions_are_read_and_not_run() -> None:
    x = symbol("x")
    assert expression("floor((x + 2*1 - 3) / 2) + 1") == sympy.floor((x - 1) / 2) + 1
    for text in ("x.subs(1)", "(lambda: 1)()", "[1]", "x if x else 1", "exec('1')", ""):
        with pytest.raises(DiagramError, match="expected numbers and names"):
            expression(text)


# ------------------------------------------------------------------------------------------------------------ writing


def everything() -> list[Diagram]:
    """One diagram of each kind of box."""
    tokens = embedding("v=7 -> m=4", "table").on("int: s=3") >> layer_norm("m") >> linear("m -> k=2 h=2", "q")
    seen = conv("c -> d=2", "conv", {"x": Window("x1", 3, 2, 1)}).on("c=3 x=9") >> maximum("x1")
    joined = build("a=2 b=3, a=2 c=4", lambda x, y: concat("d")(x, y))
    masked = build("y=3 x=3", lambda s: softmax("x")(add(s, s.beside(constant("causal", "y x")))))
    return [tokens, seen, joined, masked, block("b", tokens) >> scale("1/sqrt(k)"), split("m -> h k=2").on("m=6")]


@pytest.mark.parametrize("number", range(6))
def test_json_there_and_back(number: int) -> None:
    diagram = everything()[number]
    text = diagram.to_json()
    again = Diagram.from_json(text)
    assert again == diagram
    assert hash(again) == hash(diagram)
    assert again.to_json() == text
    json.loads(text)


def test_symbols_survive_json() -> None:
    diagram = conv("c -> d", "w", {"x": Window("x1", 3, 2, 1)}).on("c x") >> scale("1/sqrt(c)")
    again = Diagram.from_json(diagram.to_json())
    assert again == diagram
    assert again.sized(x=9, c=2, d=2).cod[0].shape == (2, 5)


def test_a_function_of_python_is_not_written() -> None:
    with pytest.raises(DiagramError, match="cannot be written to JSON"):
        box("f", "a -> a", torch.relu).to_json()


def test_polymorphic_boxes_compose_before_they_know_their_arrays() -> None:
    both = scale(2) >> softmax("x")
    assert isinstance(both, Polymorphic)
    x = torch.randn(3, 4)
    torch.testing.assert_close(both.on("y=3 x=4")(x), (2 * x).softmax(1))
    attention = einsum("y k h, x k h -> y x h") >> scale("1/sqrt(k)") >> softmax("x")
    q, k = torch.randn(3, 4, 2), torch.randn(5, 4, 2)
    wanted = (torch.einsum("ykh,xkh->yxh", q, k) / 2).softmax(1)
    torch.testing.assert_close(attention(q, k), wanted)


def test_differences_keep_their_order() -> None:
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(build("a=3, a=3", lambda x, y: sub(x, y))(a, b), a - b)
    assert torch.equal(build("a=3, a=3", lambda x, y: sub(y, x))(a, b), b - a)
