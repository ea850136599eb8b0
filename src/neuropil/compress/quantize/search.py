r"""Bits of layers found by trying whole assignments, or learned by gradient.

>>> costs = {name: {2: 2.0, 4: 4.0, 8: 8.0} for name in "abc"}
>>> def score(bits):  # layer b needs its bits most
...     return -sum(w * 0.25 ** bits[n] for n, w in {"a": 1.0, "b": 30.0, "c": 2.0}.items())
>>> bit_search(score, costs, budget=14, method="evolution")
{'a': 2, 'b': 8, 'c': 4}

Sources: Wang et al. 2019, arXiv:1811.08886 (HAQ: reinforcement learning; here REINFORCE on independent layers); Wu et
al. 2018, arXiv:1812.00090 (DNAS: differentiable branches); Guo et al. 2020, arXiv:1904.00420 (evolution).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.compress.quantize.mixed import SETTINGS, Table, _all, _cost
from neuropil.compress.quantize.quantizer import FakeQuantizer, Quantizer
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.packed import Packing

Score = Callable[[dict[str, int]], float]


def bit_search(
    score: Score,
    costs: Table,
    budget: float | int,
    method: str = "evolution",
    *,
    tries: int = 200,
    population: int = 20,
    seed: int = 0,
) -> dict[str, int]:
    """The bits of each layer with the highest `score(bits)` found (an accuracy, say) whose cost is within the budget.

    method: "exhaustive" (every one within the budget), "evolution" (the better half of a population is mutated and
    crossed), "reinforce" (a policy of one softmax a layer follows the score's gradient). `tries` scores at most.
    Assignments over the budget are never scored: the layer that saves most is lowered until they fit.
    Raises QuantizationError where even the fewest bits are over the budget.
    """
    least = sum(min(row.values()) for row in costs.values())
    if least > budget:
        raise QuantizationError(f"a budget of {budget:g} is below the least possible cost, {least:g}")
    if method == "exhaustive":
        return max((c for c in _all(costs) if _cost(costs, c) <= budget), key=score)
    if method not in ("evolution", "reinforce"):
        raise QuantizationError(f'method={method!r}: expected "exhaustive", "evolution" or "reinforce"')
    search = _evolution if method == "evolution" else _reinforce
    return search(_Remembering(score), costs, budget, tries, population, torch.Generator().manual_seed(seed))


class _Remembering:
    """Scores each assignment once, and knows the best."""

    def __init__(self, score: Score) -> None:
        self.score, self.known, self.rounds = score, dict[tuple[int, ...], float](), 0
        self.best: tuple[float, dict[str, int]] = (float("-inf"), {})

    def __call__(self, bits: dict[str, int]) -> float:
        key = tuple(bits.values())
        if key not in self.known:
            self.known[key] = float(self.score(dict(bits)))
            if self.known[key] > self.best[0] or not self.best[1]:
                self.best = (self.known[key], dict(bits))
        return self.known[key]


def _fit(bits: dict[str, int], costs: Table, budget: float | int) -> dict[str, int]:
    """Lower the layer that saves most until the budget is met."""
    bits = dict(bits)
    while _cost(costs, bits) > budget:
        steps = [(costs[n][b] - costs[n][lower], n, lower) for n, b in bits.items() for lower in _below(costs[n], b)]
        _, name, lower = max(steps)
        bits[name] = lower
    return bits


def _below(row: Mapping[int, float], b: int) -> Sequence[int]:
    """The next cheaper number of bits, if there is one."""
    cheaper = [x for x in row if row[x] < row[b]]
    return [max(cheaper, key=lambda x: row[x])] if cheaper else []


def _evolution(
    score: _Remembering, costs: Table, budget: float | int, tries: int, population: int, generator: torch.Generator
) -> dict[str, int]:
    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    options = {name: sorted(row) for name, row in costs.items()}
    uniform = [{n: o[min(k, len(o) - 1)] for n, o in options.items()} for k in range(max(map(len, options.values())))]
    people = [_fit(bits, costs, budget) for bits in uniform]
    people += [_fit({n: o[draw(len(o))] for n, o in options.items()}, costs, budget) for _ in range(population)]
    stale = 0  # generations that held nothing new
    while len(score.known) < tries and stale < 10:
        before = len(score.known)
        people = sorted({tuple(p.items()): p for p in people}.values(), key=score, reverse=True)[: population // 2]
        stale = 0 if len(score.known) > before else stale + 1
        children = []
        for _ in range(population - len(people)):
            a, b = people[draw(len(people))], people[draw(len(people))]
            child = {n: (a, b)[draw(2)][n] for n in options}
            name = list(options)[draw(len(options))]
            child[name] = options[name][draw(len(options[name]))]
            children.append(_fit(child, costs, budget))
        people += children
    return score.best[1]


def _reinforce(
    score: _Remembering, costs: Table, budget: float | int, tries: int, population: int, generator: torch.Generator
) -> dict[str, int]:
    names, options = list(costs), [sorted(row) for row in costs.values()]
    logits = [torch.zeros(len(o), requires_grad=True) for o in options]
    optimizer = torch.optim.Adam(logits, lr=0.1)
    for _ in range(max(1, tries // population)):
        rewards, chances = [], []
        for _ in range(population):
            chosen = [int(torch.multinomial(x.detach().softmax(0), 1, generator=generator)) for x in logits]
            bits = {n: o[c] for n, o, c in zip(names, options, chosen, strict=True)}
            fitting = _fit(bits, costs, budget)
            rewards.append(score(fitting))
            # the chance of what was scored: the policy learns to stay within the budget
            at = [o.index(fitting[n]) for n, o in zip(names, options, strict=True)]
            chances.append(torch.stack([x.log_softmax(0)[c] for x, c in zip(logits, at, strict=True)]).sum())
        reward = torch.tensor(rewards)
        advantage = (reward - reward.mean()) / reward.std().clamp_min(1e-8)
        optimizer.zero_grad()
        (-(advantage * torch.stack(chances)).mean()).backward()
        optimizer.step()
    return score.best[1]


class BitBranches(FakeQuantizer):
    """A weight rounded to several numbers of bits at once, mixed by a learned softmax: train, then take `bits`.

    As a parametrization (`qat_prepare(model, BitBranches((2, 4, 8)))`). Add `expected_cost` of all layers to the loss:
    with the weights' cost at each number of bits it is the mean over the softmax. `pack` takes the likeliest branch.
    """

    def __init__(self, choices: Sequence[int] = (2, 4, 8), settings: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.choices, self.given = tuple(choices), dict(SETTINGS if settings is None else settings)
        self.branches = nn.ModuleList(Quantizer(**{**self.given, "bits": b}) for b in choices)
        self.alpha = nn.Parameter(torch.zeros(len(choices)))

    def settings(self) -> dict[str, Any]:
        return {"choices": self.choices, "settings": self.given}

    def for_layer(self, module: nn.Module) -> FakeQuantizer:
        made = super().for_layer(module)
        assert isinstance(made, BitBranches)
        for branch in made.branches:
            assert isinstance(branch, Quantizer)
            branch.axis, branch.splits = made.axis, made.splits
        return made

    @property
    def shares(self) -> Float[Tensor, " choices"]:
        """How much of each branch there is."""
        return self.alpha.softmax(0)

    @property
    def bits(self) -> int:
        """The likeliest number of bits."""
        return self.choices[int(self.alpha.argmax())]

    def expected_cost(self, row: Mapping[int, float]) -> Float[Tensor, ""]:
        """The mean cost of the layer; `row` is its row of a table of costs."""
        return (self.shares * torch.tensor([row[b] for b in self.choices]).to(self.alpha)).sum()

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        rounded = torch.stack([branch(w) for branch in self.branches])
        mixed: Tensor = torch.einsum("b,b...->...", self.shares.to(w.dtype), rounded)
        return mixed

    def pack(self, w: Float[Tensor, "*shape"]) -> Packing:
        branch = self.branches[int(self.alpha.argmax())]
        assert isinstance(branch, Quantizer)
        return branch.pack(w)
