r"""How far a map's Jacobian is from symmetric: measured whole, and penalised by random probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["jacobian", "jacobian_homeostasis_loss", "symmetry_score"]


def jacobian_homeostasis_loss(
    f: Callable[[Any], Any], u: Any, n_draws: int = 5, generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    r"""$E_\epsilon[\lVert J\epsilon \rVert^2 - \epsilon^T J^2 \epsilon] / n = 2 \lVert (J - J^T)/2 \rVert_F^2 / n$.

    For any map `f` from a batch of states to a batch of states (the update of a deep equilibrium model or of a
    Hopfield network, `EquilibriumNetwork.coupling`), with $J$ the Jacobian of each of the examples at `u` and $n$
    its number of units. `f` and `f - identity` give the same value, draw by draw. `u` is `[b, ...]` or a dict of
    such tensors and is held fixed: the gradient reaches the parameters of `f` through $J$ alone.

    Unbiased with any number of draws, and exactly zero for symmetric $J$; a single draw may be negative.
    Raises ValueError where `f` does not return the shapes it is given, or for fewer than one draw.
    """
    if n_draws < 1:
        raise ValueError(f"n_draws is {n_draws}; expected 1 or more")
    names, parts = _parts(u)
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    with torch.enable_grad():
        outputs = _outputs(f, names, leaves)
        draws = torch.stack([_probe(outputs, leaves, generator) for _ in range(n_draws)])
    units = sum(part[0].numel() for part in parts)
    return draws.mean() / units


def _probe(outputs: list[Tensor], leaves: list[Tensor], generator: torch.Generator | None) -> Float[Tensor, " b"]:
    r"""$\lVert J\epsilon\rVert^2 - (J^T\epsilon) \cdot (J\epsilon)$ of each example, for one draw of $\epsilon$."""
    probe = [_normal(part, generator).requires_grad_() for part in leaves]
    turned = torch.autograd.grad(outputs, leaves, probe, create_graph=True, allow_unused=True, materialize_grads=True)
    # J^T e is linear in e, so that its derivative along e is J e.
    pushed = torch.autograd.grad(
        turned, probe, [part.detach() for part in probe], create_graph=True, allow_unused=True, materialize_grads=True
    )
    return _flat(pushed).square().sum(1) - (_flat(turned) * _flat(pushed)).sum(1)


@torch.no_grad()
def jacobian(f: Callable[[Any], Any], u: Any) -> Float[Tensor, "b n n"]:
    """The Jacobian of each example of a batch, units in the order of the flattened (and concatenated) state.

    Assumes that the examples do not influence one another. Needs memory for `n` backward passes at once.
    """
    names, parts = _parts(u)
    flat = _flat(parts).detach()
    sizes = [part[0].numel() for part in parts]

    def whole(state: Tensor) -> Tensor:
        pieces = zip(state.split(sizes, 1), parts, strict=True)
        return _flat(_outputs(f, names, [piece.reshape(part.shape) for piece, part in pieces]))

    pull = torch.func.vjp(whole, flat)[1]
    basis = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    return torch.func.vmap(lambda row: pull(row.expand_as(flat))[0], out_dims=1)(basis)


def symmetry_score(f: Callable[[Any], Any], u: Any) -> Float[Tensor, " b"]:
    r"""$\lVert S \rVert / (\lVert S \rVert + \lVert A \rVert)$ of $J = S + A$ for each example: 1 is symmetric.

    About 0.5 for a Jacobian of independent random entries, 0 for an antisymmetric one.
    """
    J = jacobian(f, u)
    symmetric = (J + J.mT).norm(dim=(1, 2))
    return symmetric / (symmetric + (J - J.mT).norm(dim=(1, 2)))


def _parts(u: Any) -> tuple[list[str] | None, list[Tensor]]:
    return (list(u), list(u.values())) if isinstance(u, dict) else (None, [u])


def _outputs(f: Callable[[Any], Any], names: list[str] | None, parts: list[Tensor]) -> list[Tensor]:
    """What `f` makes of the state, in the state's order."""
    out = f(parts[0] if names is None else dict(zip(names, parts, strict=True)))
    found = (
        _parts(out)[1] if names is None or not isinstance(out, dict) else [out[name] for name in names if name in out]
    )
    given, got = ([tuple(part.shape) for part in some] for some in (parts, found))
    if given != got:
        raise ValueError(f"f turns a state of shapes {given} into {got}; a fixed-point map keeps its state's shapes")
    return found


def _flat(parts: Sequence[Tensor]) -> Float[Tensor, "b n"]:
    return torch.cat([part.flatten(1) for part in parts], 1)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
