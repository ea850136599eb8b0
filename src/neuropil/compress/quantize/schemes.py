"""The schemes of levels by name: what finds the levels of tiles `[r, g, n]` in so many bits."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from neuropil.compress.quantize.codes import binary_code_levels
from neuropil.compress.quantize.grids import Levels
from neuropil.compress.quantize.nonuniform import apot, lloyd_max, pow2
from neuropil.compress.quantize.signs import binary, ternary

LEVELS: dict[str, Callable[[Tensor, int], Levels]] = {
    "binary": binary,
    "ternary": ternary,
    "pow2": pow2,
    "apot": apot,
    "binary-code": binary_code_levels,
    "codebook": lloyd_max,
}


def fit_levels(scheme: str, x: Float[Tensor, "r g n"], bits: int) -> Levels:
    """The levels of a scheme for the numbers of each tile."""
    return LEVELS[scheme](x, bits)
