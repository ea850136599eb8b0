"""Forty-two faults in five small networks, each written in the language of diagrams and in PyTorch.

A program takes the name of one of its faults, or none. In PyTorch every intermediate result is annotated by a call
of `see` with the axes that it should have, which is what jaxtyping checks; sizes come from the seed, and two axes
may have the same size, as they do in networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neuropil.interpret.diagrams import (
    Diagram,
    Window,
    add,
    build,
    constant,
    conv,
    einsum,
    linear,
    max_pool,
    mean,
    mean_pool,
    merge,
    mul,
    relu,
    rename,
    rsqrt,
    scale,
    shift,
    softmax,
    split,
    square,
    sub,
    transpose,
    weight,
)

See = Callable[[Tensor, str], Tensor]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Program:
    """One network in both languages, its faults, and the axes whose sizes are drawn."""

    name: str
    bugs: tuple[str, ...]
    draw: Callable[[Callable[..., int]], dict[str, int]]
    diagram: Callable[[str, dict[str, Any]], Diagram]
    torch: Callable[[str, Weights, tuple[Tensor, ...], See], Tensor]


# ---------------------------------------------------------------------------------------------------------- attention


def attention_diagram(bug: str, n: dict[str, Any]) -> Diagram:
    def program(q: Any, k: Any, v: Any) -> Any:
        if bug == "keys and values swapped":
            k, v = v, k
        pair = (k, q) if bug == "queries and keys swapped" else (q, k)
        kept = "k" if bug == "contracts heads instead of keys" else "h"
        scores = einsum(f"y k h, x k h -> y x {kept}")(*pair)
        if bug != "scale missing":
            scores = scale("1/sqrt(h)" if bug == "scale by heads" else "1/sqrt(k)")(scores)
        if bug != "softmax missing":
            over = {"softmax over queries": "y", "softmax over heads": "h"}.get(bug, "x")
            scores = softmax(over)(scores)
        if bug == "sums over queries":
            return einsum("y x h, x k h -> x k h")(scores, v)
        return einsum("y x h, x k h -> y k h")(scores, v)

    sizes = "y={y} k={k} h={h}, x={x} k={k} h={h}, x={x} k={k} h={h}".format(**n)
    return build(sizes, program)


def attention_torch(bug: str, w: Weights, inputs: tuple[Tensor, ...], see: See) -> Tensor:
    q, k, v = see(inputs[0], "y k h"), see(inputs[1], "x k h"), see(inputs[2], "x k h")
    if bug == "keys and values swapped":
        k, v = v, k
    size = q.shape[2] if bug == "scale by heads" else q.shape[1]
    pair = (k, q) if bug == "queries and keys swapped" else (q, k)
    kept = "k" if bug == "contracts heads instead of keys" else "h"
    scores = see(torch.einsum(f"ykh,xkh->yx{kept}", *pair), "y x h")
    if bug != "scale missing":
        scores = see(scores / math.sqrt(size), "y x h")
    if bug != "softmax missing":
        scores = see(scores.softmax({"softmax over queries": 0, "softmax over heads": 2}.get(bug, 1)), "y x h")
    out = "xkh" if bug == "sums over queries" else "ykh"
    return see(torch.einsum(f"yxh,xkh->{out}", scores, v), "y k h")


# ---------------------------------------------------------------------------------------------------------- multi-head


def heads_diagram(bug: str, n: dict[str, Any]) -> Diagram:
    def project(x: Any, name: str, row: str) -> Any:
        if bug == "keys and values share a map" and name == "v":
            name = "k"
        made = x if bug == "values not mapped" and name == "v" else linear(f"m -> n={n['n']}", name, bias=False)(x)
        if bug == "head layout swapped" and name == "q":
            return split(f"n -> h={n['h']} k={n['k']}")(made)
        if bug == "head layout swapped and turned back" and name == "q":
            return transpose(f"{row} k h")(split(f"n -> h={n['h']} k={n['k']}")(made))
        return split(f"n -> k={n['k']} h={n['h']}")(made)

    def program(y: Any) -> Any:
        x = rename(y="x")(y)
        q, k, v = project(y, "q", "y"), project(x, "k", "x"), project(x, "v", "x")
        scores = scale("1/sqrt(k)")(einsum("y k h, x k h -> y x h")(q, k))
        axes = "x y" if bug == "mask transposed" else "y x"
        late = bug == "mask after the softmax"
        mask = constant("causal", axes)
        if bug != "mask missing" and not late:
            scores = add(scores, y.beside(mask))
        scores = softmax("x")(scores)
        if late:
            scores = add(scores, y.beside(mask))
        mixed = einsum("y x h, x k h -> y k h")(scores, v)
        flat = merge("h k -> n" if bug == "heads merged in the other order" else "k h -> n")(mixed)
        if bug == "output map missing":
            return flat
        return rename(o="m")(linear(f"n -> o={n['m']}", "o", bias=False)(flat))

    return build("y={y} m={m}".format(**n), program)


def heads_torch(bug: str, w: Weights, inputs: tuple[Tensor, ...], see: See) -> Tensor:
    x = see(inputs[0], "y m")
    n = len(w["q.weight"])
    k, h = (int(size) for size in w["sizes"])

    def project(name: str) -> Tensor:
        if bug == "keys and values share a map" and name == "v":
            name = "k"
        made = x if bug == "values not mapped" and name == "v" else see(x @ w[f"{name}.weight"].T, "y n")
        if bug == "head layout swapped" and name == "q":
            return see(made.view(len(x), h, k), "y k h")
        if bug == "head layout swapped and turned back" and name == "q":
            return see(made.view(len(x), h, k).transpose(1, 2), "y k h")
        return see(made.view(len(x), k, h), "y k h")

    q, key, v = project("q"), project("k"), project("v")
    scores = see(torch.einsum("ykh,xkh->yxh", q, key) / math.sqrt(k), "y x h")
    mask = torch.full((len(x), len(x)), -torch.inf, dtype=x.dtype).triu(1)
    mask = (mask.T if bug == "mask transposed" else mask)[..., None]
    if bug not in ("mask missing", "mask after the softmax"):
        scores = see(scores + mask, "y x h")
    scores = see(scores.softmax(1), "y x h")
    if bug == "mask after the softmax":
        scores = scores + mask
    mixed = see(torch.einsum("yxh,xkh->ykh", scores, v), "y k h")
    if bug == "heads merged in the other order":
        mixed = mixed.transpose(1, 2)
    flat = see(mixed.reshape(len(x), n), "y n")
    return see(flat if bug == "output map missing" else flat @ w["o.weight"].T, "y m")


# -------------------------------------------------------------------------------------------------------- perceptron


def mlp_diagram(bug: str, n: dict[str, Any]) -> Diagram:
    def program(x: Any) -> Any:
        first = ("d -> e" if bug == "layers in the wrong order" else "m -> d") + f"={n['d']}"
        hidden = linear(first, "up", bias=False)(x)
        bias = x.beside(weight("up.bias", f"d={n['d']}"))
        hidden = add(hidden, rename(d="b")(bias) if bug == "bias over the batch" else bias)
        if bug != "activation missing":
            hidden = relu(hidden)
        out = rename(o="m")(linear(f"d -> o={n['m']}", "down", bias=False)(hidden))
        if bug != "residual missing":
            out = add(out, hidden if bug == "residual from the hidden layer" else x)
        if bug == "output activated":
            out = relu(out)
        out = softmax("b" if bug == "softmax over the batch" else "m")(out)
        return mean("b" if bug == "mean over the batch" else "m")(mul(out, out))

    return build("b={b} m={m}".format(**n), program)


def mlp_torch(bug: str, w: Weights, inputs: tuple[Tensor, ...], see: See) -> Tensor:
    x = see(inputs[0], "b m")
    if bug == "layers in the wrong order":
        hidden = see(x @ w["down.weight"].T, "b d")
    else:
        hidden = see(x @ w["up.weight"].T, "b d")
    bias = w["up.bias"]
    hidden = see(hidden + (bias[:, None] if bug == "bias over the batch" else bias), "b d")
    if bug != "activation missing":
        hidden = see(hidden.relu(), "b d")
    out = see(hidden @ w["down.weight"].T, "b m")
    if bug != "residual missing":
        out = see(out + (hidden if bug == "residual from the hidden layer" else x), "b m")
    if bug == "output activated":
        out = out.relu()
    out = see(out.softmax(0 if bug == "softmax over the batch" else 1), "b m")
    return see((out * out).mean(0 if bug == "mean over the batch" else 1), "b")


# -------------------------------------------------------------------------------------------------------------- norm


def norm_diagram(bug: str, n: dict[str, Any]) -> Diagram:
    def program(x: Any) -> Any:
        over = {"mean over the batch": "b", "mean over places": "s"}.get(bug, "m")
        centred = sub(x, mean(over)(x))
        spread = mean("s" if bug == "variance over places" else "m")(
            square(x if bug == "variance not centred" else centred)
        )
        normal = mul(centred, rsqrt(shift(0.1)(spread)))
        gain, bias = (x.beside(weight(name, f"m={n['m']}")) for name in ("gain", "bias"))
        if bug == "gain over places":
            gain = rename(m="s")(gain)
        normal = (add if bug == "gain added" else mul)(normal, gain)
        return normal if bug == "bias missing" else add(normal, bias)

    return build("b={b} s={s} m={m}".format(**n), program)


def norm_torch(bug: str, w: Weights, inputs: tuple[Tensor, ...], see: See) -> Tensor:
    x = see(inputs[0], "b s m")
    centre = x.mean({"mean over the batch": 0, "mean over places": 1}.get(bug, 2), keepdim=True)
    centred = see(x - see(centre, "b s 1"), "b s m")
    of = x if bug == "variance not centred" else centred
    spread = see(of.square().mean(1 if bug == "variance over places" else 2, keepdim=True), "b s 1")
    normal = see(centred * torch.rsqrt(spread + 0.1), "b s m")
    gain = w["gain"][:, None] if bug == "gain over places" else w["gain"]
    normal = see(normal + gain if bug == "gain added" else normal * gain, "b s m")
    return normal if bug == "bias missing" else see(normal + w["bias"], "b s m")


# ------------------------------------------------------------------------------------------------------- convolution


def conv_diagram(bug: str, n: dict[str, Any]) -> Diagram:
    def program(image: Any) -> Any:
        stride = 1 if bug == "stride 1 instead of 2" else 2
        padding = 0 if bug == "padding missing" else 2 if bug == "dilated" else 1
        window = {a: Window(f"{a}1", 3, stride, padding, 2 if bug == "dilated" else 1) for a in "xy"}
        first = conv(f"c -> d={n['d']}", "conv1", window, bias=False)(image)
        fresh = relu(first)
        same = {a: Window(a, 3, 1, 1) for a in ("x1", "y1")}
        name = "conv2"
        second = rename(e="d")(conv(f"d -> e={n['d']}", name, same, bias=False)(fresh))
        gain = image.beside(weight("gain", f"d={n['d']}"))
        second = mul(second, rename(d="x1")(gain) if bug == "gain along x" else gain)
        if bug != "skip missing":
            second = add(second, fresh if bug == "skip after the activation" else first)
        pool = mean_pool if bug == "mean instead of maximum" else max_pool
        small = pool({a: Window(f"{a[0]}2", 2, 2) for a in ("x1", "y1")})(second)
        if bug == "mean over one axis":
            return mean("y2")(small)
        flat = merge("x2 y2 d -> p" if bug == "flattened in another order" else "d x2 y2 -> p")(small)
        return linear(f"p -> o={n['o']}", "out", bias=False)(flat)

    return build("c={c} x={x} y={y}".format(**n), program)


def conv_torch(bug: str, w: Weights, inputs: tuple[Tensor, ...], see: See) -> Tensor:
    x = see(inputs[0], "c x y")
    padding = 0 if bug == "padding missing" else 2 if bug == "dilated" else 1
    stride = 1 if bug == "stride 1 instead of 2" else 2
    first = F.conv2d(x[None], w["conv1.weight"], None, stride, padding, 2 if bug == "dilated" else 1)[0]
    first = see(first, "d x//2 y//2")
    fresh = see(first.relu(), "d x//2 y//2")
    second = see(F.conv2d(fresh[None], w["conv2.weight"], None, 1, 1)[0], "d x//2 y//2")
    gain = w["gain"][None, :, None] if bug == "gain along x" else w["gain"][:, None, None]
    second = see(second * gain, "d x//2 y//2")
    if bug != "skip missing":
        second = see(second + (fresh if bug == "skip after the activation" else first), "d x//2 y//2")
    pool = F.avg_pool2d if bug == "mean instead of maximum" else F.max_pool2d
    small = see(pool(second[None], 2)[0], "d x//4 y//4")
    if bug == "mean over one axis":
        return see(small.mean(2), "o")
    flat = small.permute(1, 2, 0) if bug == "flattened in another order" else small
    return see(w["out.weight"] @ flat.reshape(-1), "o")


PROGRAMS = (
    Program(
        "attention",
        ("softmax over queries", "softmax over heads", "scale missing", "scale by heads", "softmax missing",
         "contracts heads instead of keys", "keys and values swapped", "sums over queries",
         "queries and keys swapped"),
        lambda pick: {"y": pick(4, 6, 8), "x": pick(4, 6, 8), "k": pick(4, 8), "h": pick(2, 6)},
        attention_diagram,
        attention_torch,
    ),
    Program(
        "multi-head attention",
        ("head layout swapped", "head layout swapped and turned back", "heads merged in the other order",
         "output map missing", "keys and values share a map", "values not mapped", "mask missing",
         "mask transposed", "mask after the softmax"),
        lambda pick: (lambda y, k, h: {"y": y, "k": k, "h": h, "n": k * h, "m": k * h})(
            pick(4, 6, 8), pick(2, 4), pick(2, 4)
        ),
        heads_diagram,
        heads_torch,
    ),
    Program(
        "perceptron",
        ("activation missing", "softmax over the batch", "layers in the wrong order", "residual missing",
         "residual from the hidden layer", "bias over the batch", "mean over the batch", "output activated"),
        lambda pick: {"b": pick(4, 8, 16), "m": pick(4, 8), "d": pick(8, 16)},
        mlp_diagram,
        mlp_torch,
    ),
    Program(
        "layer norm",
        ("mean over the batch", "mean over places", "variance not centred", "variance over places", "gain over places",
         "gain added", "bias missing"),
        lambda pick: {"b": pick(2, 4), "s": pick(4, 6, 8), "m": pick(4, 8)},
        norm_diagram,
        norm_torch,
    ),
    Program(
        "convolutions",
        ("stride 1 instead of 2", "padding missing", "dilated", "gain along x", "skip missing",
         "skip after the activation", "mean instead of maximum", "mean over one axis", "flattened in another order"),
        lambda pick: {"c": pick(1, 3), "d": pick(4, 8), "x": pick(8, 16), "y": pick(8, 16), "o": 5},
        conv_diagram,
        conv_torch,
    ),
)  # fmt: skip
