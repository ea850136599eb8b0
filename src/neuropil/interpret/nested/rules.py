r"""How the gains of wires change by what flows through them.

A rule sees, at each step, what came in at the sources x, what went out at the targets y = W x, and, where there is a
teacher, what was wanted there; and it may see a reward. Batches are averaged.

>>> rule = hebbian(0.1)
>>> gain = torch.tensor([[2.0]])
>>> rule.change(gain, rule.begin(gain), Flow(torch.tensor([1.0]), torch.tensor([2.0]), gain > 0))[0]
tensor([[0.2000]])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Slots = dict[str, Any]
Matrix = Float[Tensor, "targets sources"]


@dataclass(frozen=True)
class Flow:
    """What passed in one step: at the sources, at the targets, what was wanted at the targets, and the reward.

    `wires` has True where a wire is that may learn.
    """

    pre: Float[Tensor, "*batch sources"]
    post: Float[Tensor, "*batch targets"]
    wires: Bool[Tensor, "targets sources"]
    wanted: Float[Tensor, "*batch targets"] | None = None  # equal to `post` where nobody teaches
    reward: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """`begin(gain)`: what the rule keeps besides the gains; `change(gain, kept, flow)`: (what to add, what to keep).

    A rule with `noise` in what it keeps has it added at the targets. `needs`: "", "teachers" or "reward".
    """

    name: str
    begin: Callable[[Tensor], Slots]
    change: Callable[[Tensor, Slots, Flow], tuple[Tensor, Slots]]
    needs: str = ""


def hebbian(lr: float, decay: float = 0.0) -> Rule:
    r"""Hebb: $\Delta W = \eta\,(y x^T - \mathrm{decay}\, W)$. Without decay they grow for ever."""
    _positive(lr=lr, decay=decay)

    def change(gain: Tensor, slots: Slots, flow: Flow) -> tuple[Tensor, Slots]:
        return lr * (outer(flow.post, flow.pre) - decay * gain), slots

    return Rule("hebbian", _nothing, change)


def oja(lr: float) -> Rule:
    r"""Oja: $\Delta W_{ij} = \eta\, y_i (x_j - y_i W_{ij})$. Rows turn to the leading eigenvector of the inputs."""
    _positive(lr=lr)

    def change(gain: Tensor, slots: Slots, flow: Flow) -> tuple[Tensor, Slots]:
        power = flow.post.square().flatten(0, -2).mean(0) if flow.post.ndim > 1 else flow.post.square()
        return lr * (outer(flow.post, flow.pre) - power[:, None] * gain), slots

    return Rule("oja", _nothing, change)


def gradient(lr: float, normalised: bool = False) -> Rule:
    r"""Gradient descent on $|y - y_{wanted}|^2 / 2$ (the delta rule): $\Delta W = \eta\,(y_{wanted} - y) x^T$.

    normalised: by $|x|^2$ of what reaches the target by wires that learn, so that any `lr` below 2 is stable
    (normalised least mean squares).
    """
    _positive(lr=lr)

    def change(gain: Tensor, slots: Slots, flow: Flow) -> tuple[Tensor, Slots]:
        if flow.wanted is None:
            return torch.zeros_like(gain), slots
        error = flow.wanted - flow.post
        if normalised:
            error = error / _power(flow)
        return lr * outer(error, flow.pre), slots

    return Rule("gradient", _nothing, change, "teachers")


def reward_modulated(
    lr: float, noise: float = 0.1, trace: float = 0.0, baseline: float = 0.05, seed: int = 0, normalised: bool = False
) -> Rule:
    r"""Three factors: the targets are shaken by $\xi$ of size `noise`, and what was followed by reward is kept.

    $e \leftarrow \mathrm{trace}\; e + \xi x^T / \mathrm{noise}^2$, $\Delta W = \eta\,(R - \bar R)\, e$, where
    $\bar R$ is a running mean of the reward with rate `baseline`, the first reward at first. In the mean it ascends the
    reward. The next noise is part of the state, drawn from `seed`, so a run can be repeated and resumed. Without a
    reward port, R is -|y - y_wanted|^2 / 2 of the teachers. `normalised`: as in `gradient`.
    """
    _positive(lr=lr, trace=trace, baseline=baseline)
    if noise <= 0:
        raise ValueError(f"noise={noise}; expected more than 0: without it nothing is tried")

    def draw(gain: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        return noise * torch.randn(len(gain), generator=generator, dtype=gain.dtype).to(gain.device)

    def begin(gain: Tensor) -> Slots:
        zero = torch.zeros((), dtype=gain.dtype, device=gain.device)
        return {"noise": draw(gain, 0), "trace": torch.zeros_like(gain), "expected": zero, "count": torch.tensor(0)}

    def change(gain: Tensor, slots: Slots, flow: Flow) -> tuple[Tensor, Slots]:
        reward = flow.reward
        if reward is None:
            assert flow.wanted is not None
            reward = -(flow.wanted - flow.post).square().sum(-1) / 2
        expected = torch.where(slots["count"] == 0, reward.mean(), slots["expected"])
        surprise, count = reward.mean() - expected, slots["count"] + 1
        shaken = slots["noise"].expand_as(flow.post) / (_power(flow) if normalised else 1.0)
        tried = trace * slots["trace"] + outer(shaken, flow.pre) / noise**2
        after = expected + baseline * surprise
        return lr * surprise * tried, {
            "noise": draw(gain, int(count)),
            "trace": tried,
            "expected": after,
            "count": count,
        }

    return Rule("reward-modulated", begin, change, "reward")


def outer(post: Float[Tensor, "*batch m"], pre: Float[Tensor, "*batch n"]) -> Float[Tensor, "m n"]:
    """The mean over the batch of post preᵀ."""
    rows = post.reshape(-1, post.shape[-1])
    return rows.T @ pre.reshape(-1, pre.shape[-1]) / len(rows)


def _power(flow: Flow) -> Float[Tensor, "*batch targets"]:
    """Of what reaches each target by wires that learn."""
    return flow.pre.square() @ flow.wires.to(flow.pre).T + 1e-6


def _nothing(gain: Tensor) -> Slots:
    return {}


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name}={value}; expected 0 or more")
