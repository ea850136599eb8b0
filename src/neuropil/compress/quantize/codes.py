"""Scales and signs whose sum is near the numbers of a tile: the three ways of `binary_codes`."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from neuropil.compress.quantize.grids import Levels, nearest

ROUNDS = 15


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1, -1).to(torch.int8)


def greedy_codes(
    x: Float[Tensor, "r g n"], bases: int
) -> tuple[Float[Tensor, "r g bases"], Int8[Tensor, "r g bases n"]]:
    """Scales and signs, each the least-squares best for what the ones before it leave."""
    alphas, signs, left = [], [], x
    for _ in range(bases):
        alphas.append(left.abs().mean(-1))
        signs.append(_signs(left))
        left = left - alphas[-1][..., None] * signs[-1]
    return torch.stack(alphas, -1), torch.stack(signs, -2)


def _solve(x: Tensor, signs: Tensor) -> Tensor:
    """Least squares for the scales: (B B^T) alpha = B x; the pseudo-inverse where signs repeat one another."""
    b = signs.to(torch.float64)
    gram = b @ b.mT
    return (torch.linalg.pinv(gram, hermitian=True) @ (b @ x.double()[..., None]))[..., 0].to(x.dtype)


def _combinations(bases: int, device: torch.device) -> Tensor:
    """`[2^bases, bases]`: all signs."""
    number = torch.arange(2**bases, device=device)[:, None]
    return (2 * ((number >> torch.arange(bases, device=device)) & 1) - 1).to(torch.int8)


def alternating_codes(
    x: Float[Tensor, "r g n"], bases: int, rounds: int = ROUNDS
) -> tuple[Float[Tensor, "r g bases"], Int8[Tensor, "r g bases n"]]:
    """From the greedy codes, `rounds` of least squares for the scales and the best signs for each number."""
    alpha, signs = greedy_codes(x, bases)
    every = _combinations(bases, x.device)
    for _ in range(rounds):
        alpha = _solve(x, signs)
        level, order = (alpha @ every.to(alpha).mT).sort(-1)
        best = nearest(level).codes(x).long()
        signs = every[order.gather(-1, best)].movedim(-1, -2)
    return alpha, signs


def abc_codes(x: Float[Tensor, "r g n"], bases: int) -> tuple[Float[Tensor, "r g bases"], Int8[Tensor, "r g bases n"]]:
    """The bases of ABC-Net: signs of the weights shifted by -1 to 1 standard deviations, least-squares scales."""
    shift = torch.linspace(-1, 1, bases, device=x.device, dtype=x.dtype) if bases > 1 else x.new_zeros(1)
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    signs = _signs(centred[..., None, :] + (shift * spread)[..., None])
    return _solve(x, signs), signs


METHODS = {"greedy": greedy_codes, "alternating": alternating_codes, "abc": abc_codes}


def binary_code_levels(x: Float[Tensor, "r g n"], bits: int) -> Levels:
    """The 2^b sums of the alternating method as levels of `Quantizer(scheme="binary-code")`."""
    alpha, _ = alternating_codes(x, bits)
    return nearest(alpha @ _combinations(bits, x.device).to(alpha).mT)
