"""Eight architectures in the language: what the paper draws, at any size.

Sizes are numbers or free: `attention()` is a diagram in the symbols y, x, k and h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuropil.interpret.diagrams.construct import block, build
from neuropil.interpret.diagrams.core import Diagram, Wire
from neuropil.interpret.diagrams.learned import batch_norm, layer_norm, linear
from neuropil.interpret.diagrams.library import (
    add,
    concat,
    constant,
    einsum,
    mean,
    merge,
    relu,
    rename,
    scale,
    softmax,
    split,
    transpose,
)
from neuropil.interpret.diagrams.spatial import Window, Windows, conv, conv_transpose, max_pool


def mlp(pixels: int = 28, hidden: int = 512, classes: int = 10) -> Diagram:
    """A recogniser of images: two hidden layers of ReLU, a softmax over the classes."""

    def network(x: Wire) -> Any:
        flat = merge("x y -> p")(x)
        first = relu(linear(f"p -> a={hidden}", "first")(flat))
        second = relu(linear(f"a -> b={hidden}", "second")(first))
        return softmax("c")(linear(f"b -> c={classes}", "out")(second))

    return build(f"x={pixels} y={pixels}", network)


def attention(masked: bool = False, y: str = "y", x: str = "x") -> Diagram:
    """Scaled dot-product attention of several heads: queries y k h, keys and values x k h."""

    def heads(q: Wire, k: Wire, v: Wire) -> Any:
        scores = scale("1/sqrt(k)")(einsum(f"{y} k h, {x} k h -> {y} {x} h")(q, k))
        if masked:
            scores = add(scores, q.beside(constant("causal", f"{y} {x}")))
        return einsum(f"{y} {x} h, {x} k h -> {y} k h")(softmax(x)(scores), v)

    return build(f"{y} k h, {x} k h, {x} k h", heads)


def multi_head_attention(
    m: Any = "m", k: Any = "k", h: Any = "h", masked: bool = False, y: str = "y", x: str = "x"
) -> Diagram:
    """Attention with learned maps to and from the heads, without biases: y m, x m -> y m."""

    def network(rows: Wire, columns: Wire) -> Any:
        q = linear(f"m -> k={k} h={h}", "q", bias=False)(rows)
        key, value = (linear(f"m -> k={k} h={h}", name, bias=False)(columns) for name in ("k", "v"))
        return rename(n="m")(linear(f"k h -> n={m}", "o", bias=False)(attention(masked, y, x)(q, key, value)))

    return build(f"{y} m={m}, {x} m={m}", network)


def transformer(m: int = 16, k: int = 4, h: int = 4, d: int = 32, layers: int = 2) -> Diagram:
    """Encoder and decoder, with the norm after each addition: source s m, target t m -> t m."""

    def feed_forward(x: Wire) -> Any:
        inner = relu(linear(f"m -> d={d}", "up")(x))
        return rename(n="m")(linear(f"d -> n={m}", "down")(inner))

    def attend(y: Wire, x: Wire, name: str, masked: bool = False) -> Any:
        """Queries from one wire, keys and values from another; where both are one, the keys' axis gets a name."""
        rows, columns = y.array.names[0], x.array.names[0]
        if rows == columns:
            columns, x = f"{rows}2", rename(**{rows: f"{rows}2"})(x)
        return block(name, multi_head_attention(m, k, h, masked, rows, columns), role="attention")(y, x)

    def encoder(x: Wire) -> Any:
        x = layer_norm("m", "norm1")(add(x, attend(x, x, "attention")))
        return layer_norm("m", "norm2")(add(x, block("mlp", build((x.array,), feed_forward))(x)))

    def decoder(y: Wire, x: Wire) -> Any:
        y = layer_norm("m", "norm1")(add(y, attend(y, y, "self", masked=True)))
        y = layer_norm("m", "norm2")(add(y, attend(y, x, "cross")))
        return layer_norm("m", "norm3")(add(y, block("mlp", build((y.array,), feed_forward))(y)))

    def network(source: Wire, target: Wire) -> Any:
        for n in range(layers):
            source = block(f"encoder.{n}", build((source.array,), encoder), role="encoder")(source)
        for n in range(layers):
            inside = build((target.array, source.array), decoder)
            target = block(f"decoder.{n}", inside, role="decoder")(target, source)
        return target

    return build(f"s=6 m={m}, t=5 m={m}", network)


def square(
    to: tuple[str, str], size: int, stride: int = 1, padding: int = 0, of: tuple[str, str] = ("x", "y")
) -> Windows:
    """The same window on two axes."""
    return {old: Window(new, size, stride, padding) for old, new in zip(of, to, strict=True)}


def convolution(stride: int = 1, padding: int = 0, dilation: int = 1, size: int = 3) -> Diagram:
    """One learned convolution in two dimensions, c x y -> d x1 y1."""
    windows = {n: Window(f"{n}1", size, stride, padding, dilation) for n in "xy"}
    return conv("c=3 -> d=4", "conv", windows).on("c=3 x=9 y=8")


def resnet(
    pixels: int = 16, stem: int = 16, widths: tuple[int, ...] = (64, 128, 256), repeats: int = 3, classes: int = 10
) -> Diagram:
    """The identity residual network: bottlenecks with norm and ReLU before each convolution, a mean, a linear map."""

    def bottleneck(width: int, stride: int, number: int) -> Any:
        def inside(x: Wire) -> Any:
            old, across, down = x.array.names
            new = (f"x{number}", f"y{number}") if stride > 1 else (across, down)
            inner = width // 4
            fresh = relu(batch_norm(old, "norm1")(x))
            y = conv(f"{old} -> p{number}={inner}", "conv1", {}, bias=False)(fresh)
            y = relu(batch_norm(f"p{number}", "norm2")(y))
            windows = square(new, 3, stride, 1, (across, down))
            y = conv(f"p{number} -> q{number}={inner}", "conv2", windows, bias=False)(y)
            y = relu(batch_norm(f"q{number}", "norm3")(y))
            y = conv(f"q{number} -> c{number}={width}", "conv3", {}, bias=False)(y)
            if x.array[old].size == width and stride == 1:
                return add(y, x)
            sides = {} if stride == 1 else square(new, 1, stride, 0, (across, down))
            return add(y, conv(f"{old} -> c{number}={width}", "shortcut", sides, bias=False)(fresh))

        return inside

    def stage(width: int, stride: int, number: int) -> Any:
        def inside(x: Wire) -> Any:
            for n in range(repeats):
                make = bottleneck(width, stride if n == 0 else 1, number)
                x = block(f"block.{n}", build((x.array,), make), role="bottleneck")(x)
            return x

        return inside

    def network(image: Wire) -> Any:
        x = conv(f"c -> c0={stem}", "stem", square(("x", "y"), 3, 1, 1), bias=False)(image)
        for number, width in enumerate(widths, 1):
            made = build((x.array,), stage(width, 1 if number == 1 else 2, number))
            x = block(f"stage{number}", made, role="stage")(x)
        across, down = x.array.names[1:]
        x = mean(f"{across} {down}")(relu(batch_norm(x.array.names[0], "norm")(x)))
        return linear(f"{x.array.names[0]} -> out={classes}", "classify")(x)

    return build(f"c=3 x={pixels} y={pixels}", network)


def unet(pixels: int = 16, base: int = 4, levels: int = 2, classes: int = 2) -> Diagram:
    """U-Net: at each level two convolutions, a pooling down; then up again beside what was kept."""

    def double(x: Wire, width: int, name: str) -> Any:
        across, down = x.array.names[1:]
        windows = square((across, down), 3, 1, 1, (across, down))

        def inside(y: Wire) -> Any:
            y = relu(conv(f"{y.array.names[0]} -> {name}a={width}", "conv1", windows)(y))
            return relu(conv(f"{name}a -> {name}b={width}", "conv2", windows)(y))

        return block(name, build((x.array,), inside), role="two convolutions")(x)

    def network(image: Wire) -> Any:
        kept, x = [], image
        for n in range(levels):
            x = double(x, base * 2**n, f"down{n}")
            kept.append(x)
            here = x.array.names[1:]
            x = max_pool(square((f"x{n + 1}", f"y{n + 1}"), 2, 2, 0, here))(x)
        x = double(x, base * 2**levels, "bottom")
        for n in reversed(range(levels)):
            here, there = x.array.names[1:], kept[n].array.names[1:]
            windows = square(there, 2, 2, 0, here)
            x = conv_transpose(f"{x.array.names[0]} -> u{n}={base * 2**n}", f"up{n}.grow", windows)(x)
            x = double(concat(f"j{n}")(kept[n], x), base * 2**n, f"up{n}")
        return conv(f"{x.array.names[0]} -> out={classes}", "classify", {})(x)

    return build(f"c=1 x={pixels} y={pixels}", network)


def visual_attention(pixels: int = 12, channels: int = 33, k: int = 8, heads: int = 4, window: int = 3) -> Diagram:
    """Attention between patches: queries, keys and values by convolution, the answer spread out by its transpose."""

    def network(image: Wire) -> Any:
        def patches(name: str, to: tuple[str, str], row: str) -> Any:
            made = conv(f"c -> k={k} h={heads}", name, square(to, window, window), bias=False)(image)
            return transpose(f"{row} k h")(merge(f"{to[0]} {to[1]} -> {row}")(made))

        q = patches("q", ("x1", "y1"), "y_")
        key, v = (patches(name, ("x2", "y2"), "x_") for name in ("k", "v"))
        scores = scale("1/sqrt(k)")(einsum("y_ k h, x_ k h -> y_ x_ h")(q, key))
        mixed = einsum("y_ x_ h, x_ k h -> y_ k h")(softmax("x_")(scores), v)
        side = pixels // window
        grid = split(f"y_ -> x1={side} y1={side}")(mixed)
        grid = transpose("k h x1 y1")(grid)
        back = {"x1": Window("x", window, window), "y1": Window("y", window, window)}
        return rename(d="c")(conv_transpose(f"k h -> d={channels}", "o", back, bias=False)(grid))

    return build(f"c={channels} x={pixels} y={pixels}", network)


SMALL: dict[str, Callable[[], Diagram]] = {
    "mlp": lambda: mlp(5, 12, 4),
    "attention": lambda: attention().sized(y=3, x=4, k=2, h=3),
    "multi-head attention": lambda: multi_head_attention(6, 3, 2).sized(y=3, x=4),
    "transformer": lambda: transformer(4, 2, 2, 6, 1),
    "convolution": lambda: convolution(2, 1, 2),
    "resnet": lambda: resnet(8, 4, (8, 16), 2),
    "u-net": lambda: unet(8, 2, 2),
    "visual attention": lambda: visual_attention(6, 3, 2, 2),
}
