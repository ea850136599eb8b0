r"""Does a layer look like its inputs or like its labels? What the nonlinearity and the task decide between them.

Trained on the same task to the same loss, a hidden layer of Tanh units takes on the geometry of the labels (conditions
of one class fall together), while one of ReLU units keeps more of the geometry of the inputs. Two alignments tell,

    target alignment A(Kz, Ky),  input alignment A(Kz, Kx),     A(K, L) = <HKH, HLH> / (||HKH|| ||HLH||)

over the condition means, and with them parallelism, cross-condition generalisation (CCGP) and decodability.
`representational_geometry` trains many small networks of each nonlinearity on tasks of chosen geometry and measures
them, beside the theory of their first step:

>>> from neuropil.interpret.geometry_tasks import unstructured
>>> found = representational_geometry([unstructured(seed=s) for s in range(4)], steps=300)
>>> mean, low, high = found.difference("target_alignment", "tanh", "relu")
>>> mean > 0.2, low > 0
(True, True)
>>> bool(abs(found.theory - found.simulated).max() < 0.1)
True

*Theory.* A neuron first moves by $dw = E[s (y - 1/2) f'(w x) x]$. The share of this movement (squared, averaged over
random weights) in the directions of the labels follows from the inputs' kernel and $E[f'(a_i) f'(a_j)]$ alone
(`neuropil.interpret.geometry_dynamics.label_share`); beside it stands the share in the gradient that backpropagation
gives the networks. For Tanh it is near 1; ReLU neurons move for the conditions they are active for, each its own.

*Your own data.* `geometry_report` measures recordings of any origin, with unequal trials, missing conditions and
p-values (`neuropil geometry` does so for files); `representation` takes the activations out of any layer of any
model; `geometry_columns` says in an atlas which neurons carry the labels.

What was chosen here. Where one number is needed for several labels it is the mean over labels. Classifiers are
trained and tested on condition means with fresh noise, of a standard deviation of 0.2 in units of the root mean
square distance of the means from their centre, in the space that the means span: independent noise elsewhere says
nothing, and the number does not depend on the width. Networks are compared as each first falls below a given loss.

Source: Matteo Alleman, Jack Lindsey, Stefano Fusi, "Task structure and nonlinearity jointly determine learned
representational geometry", ICLR 2024, arXiv:2401.13558. Which settings gave which figure is not known here: defaults
are those of the authors' scripts. The closed form of the share is derived here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from neuropil.interpret.geometry_columns import geometry_columns, representation
from neuropil.interpret.geometry_dynamics import label_share, measured_label_share
from neuropil.interpret.geometry_metrics import (
    alignment,
    ccgp,
    decodability,
    dichotomies,
    parallelism,
    participation_ratio,
)
from neuropil.interpret.geometry_networks import Networks, Nonlinearity, nonlinearity, train
from neuropil.interpret.geometry_report import GeometryReport, geometry_report
from neuropil.interpret.geometry_tasks import Task, unstructured

__all__ = [
    "GeometryReport",
    "GeometryStudy",
    "Task",
    "geometry_columns",
    "geometry_report",
    "layer_geometry",
    "representation",
    "representational_geometry",
]

NOISE = 0.2  # of the classifiers, in units of the spread of the condition means
TRIALS = 50  # a condition, to train classifiers on and to test them on
FEW = 35  # untrained dichotomies that are decoded, where there are more
Measures = dict[str, Float[np.ndarray, "nonlinearities networks"]]


@dataclass(frozen=True, eq=False)
class GeometryStudy:
    """What `representational_geometry` found; arrays are `[nonlinearities, networks]`.

    theory      share of the first movement of the weights in the directions of the labels, by the closed form
    simulated   the same share in the gradient of the real networks
    trained     measures of the last hidden layer (see `layer_geometry`), as each network first fell below the loss
    untrained   the same before training
    losses      of the networks measured
    steps       taken until then
    reached     whether the network fell below the loss; one that did not is measured at the end
    """

    nonlinearities: tuple[str, ...]
    theory: Float[np.ndarray, "f networks"]
    simulated: Float[np.ndarray, "f networks"]
    trained: Measures
    untrained: Measures
    losses: Float[np.ndarray, "f networks"]
    steps: Int[np.ndarray, "f networks"]
    reached: Bool[np.ndarray, "f networks"]
    tasks: tuple[Task, ...] = field(repr=False, default=())

    def difference(self, measure: str, a: str, b: str, confidence: float = 0.95) -> tuple[float, float, float]:
        """Of nonlinearity `a` less `b`, network by network: mean and both ends of its confidence interval."""
        rows = [self.nonlinearities.index(name) for name in (a, b)]
        apart = self.trained[measure][rows[0]] - self.trained[measure][rows[1]]
        mean = float(apart.mean())
        if len(apart) < 2:
            return mean, -math.inf, math.inf
        half = float(stats.t.ppf((1 + confidence) / 2, len(apart) - 1) * apart.std(ddof=1) / math.sqrt(len(apart)))
        return mean, mean - half, mean + half


def representational_geometry(
    tasks: Sequence[Task] | None = None,
    *,
    nonlinearities: Sequence[str | Nonlinearity] = ("tanh", "relu"),
    width: int = 128,
    depth: int = 1,
    readout: str = "trained",
    scale: float | Sequence[float] = 1.0,
    optimizer: str = "adam",
    lr: float = 1e-3,
    batch_size: int = 64,
    samples: int = 256,
    steps: int = 1000,
    level: float | None = 0.05,
    likelihood: str = "bernoulli",
    classifiers: bool = True,
    seeds: Sequence[int] | None = None,
    seed: int = 0,
) -> GeometryStudy:
    """Train one network of each nonlinearity on each task, and measure their last hidden layers.

    tasks     twenty of `unstructured` if there are none; all of the same shapes. See `geometry_tasks`
    readout   "trained", or fixed as in the paper's analysis ("uniform", "sphere", "binary"; then SGD, lr 0.1, batches
              of 200)
    scale     of the initial weights: large ones make for lazy training, which changes the layer little
    samples   noisy inputs that each network is trained on
    level     the loss at which networks are compared; None for after all `steps`
    classifiers  whether to measure CCGP and decodability, which take most of the time
    seeds     of the networks, one for each task; by default `seed`, `seed` + 1, ...

    Networks of one seed begin with the same weights whatever their nonlinearity, and see the same data in the same
    order, so that differences are paired. Raises ValueError for tasks of different shapes.
    """
    chosen = tuple(unstructured(seed=seed + i) for i in range(20)) if tasks is None else tuple(tasks)
    shapes = {(task.means.shape, task.labels.shape) for task in chosen}
    if len(shapes) != 1:
        raise ValueError(f"tasks of shapes {sorted(shapes)}; expected one or more tasks, all of the same shape")
    own = [seed + i for i in range(len(chosen))] if seeds is None else list(seeds)
    if len(own) != len(chosen):
        raise ValueError(f"{len(own)} seeds for {len(chosen)} tasks; expected one for each")
    x, y = _data(chosen, samples, own)
    factor = torch.as_tensor(scale, dtype=torch.float32).expand(len(chosen))
    sizes = [x.shape[2], *[width] * depth, y.shape[2]]
    rows: dict[str, list[Any]] = {name: [] for name in ("theory", "simulated", "losses", "steps", "reached")}
    after, before = [], []
    functions = [nonlinearity(f) for f in nonlinearities]
    for f in functions:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # noisy gradients draw from the global generator
            nets = Networks(sizes, f, own, readout=readout, scale=factor)
            before.append(_measure(nets, chosen, own, classifiers))
            rows["theory"].append(_theory(chosen, f, factor.tolist()))
            rows["simulated"].append(_first_step(nets, chosen, x, y, likelihood))
            run = train(
                nets,
                x,
                y,
                optimizer=optimizer,
                lr=lr,
                batch_size=batch_size,
                steps=steps,
                level=level,
                likelihood=likelihood,
                seeds=own,
                until_matched=level is not None,
            )
        matched = nets if run.matched is None else run.matched
        after.append(_measure(matched, chosen, own, classifiers))
        at = _place(run.losses, level)
        rows["losses"].append(run.losses[at, np.arange(len(own))])
        rows["steps"].append(run.steps[at])
        rows["reached"].append(run.reached)
    table = {name: np.stack(values) for name, values in rows.items()}
    names = tuple(f.name for f in functions)
    return GeometryStudy(names, trained=_stacked(after), untrained=_stacked(before), tasks=chosen, **table)


def layer_geometry(
    means: Any, inputs: Any, labels: Bool[np.ndarray, "n k"], *, classifiers: bool = True, seed: int = 0
) -> dict[str, float]:
    """The measures of one layer from its condition means, with the mean inputs and the labels of the conditions.

    `target_alignment`, `input_alignment`, `participation_ratio`; mean over labels of `parallelism`, `ccgp` and
    `decodability`; and `untrained`, the mean decodability of the balanced dichotomies that are no label (at most 35
    of them). Those of labels that are not balanced over 2 + 2 conditions or more are left out.
    """
    z = np.asarray(means, dtype=np.float64)
    sides = [side for side in labels.T if 2 <= side.sum() <= len(side) - 2]
    found = {
        "target_alignment": alignment(z, np.where(labels, 1.0, -1.0)),
        "input_alignment": alignment(z, inputs),
        "participation_ratio": participation_ratio(z),
        "parallelism": _mean([parallelism(z, side) for side in sides]),
    }
    if not classifiers:
        return found
    rng = np.random.default_rng(seed)
    seen, fresh = (_noisy(z, rng) for _ in range(2))
    known = {part.tobytes() for side in labels.T for part in (side, ~side)}
    others = [side for side in dichotomies(len(z), FEW + len(sides), seed) if side.tobytes() not in known][:FEW]
    if math.isnan(found["participation_ratio"]):  # there is nothing to tell conditions apart by
        return {**found, "ccgp": math.nan, "decodability": math.nan, "untrained": math.nan}
    found["ccgp"] = _mean([ccgp(*seen, side, most=36) for side in sides])
    found["decodability"] = _mean([decodability(*seen, side, test=fresh) for side in sides])
    found["untrained"] = _mean([decodability(*seen, side, test=fresh) for side in others])
    return found


def _noisy(
    z: Float[np.ndarray, "n d"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "t r"], Int[np.ndarray, " t"]]:
    """Trials around the condition means, in the space that these span (a rotation of it, which changes nothing)."""
    left, size, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    inside = left[:, : len(z) - 1] * size[: len(z) - 1]
    spread = NOISE * math.sqrt((inside**2).sum() / len(z))
    condition = np.repeat(np.arange(len(z)), TRIALS)
    return inside[condition] + spread * rng.standard_normal((len(condition), inside.shape[1])), condition


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _data(
    tasks: Sequence[Task], samples: int, seeds: Sequence[int]
) -> tuple[Float[Tensor, "networks items d"], Float[Tensor, "networks items k"]]:
    drawn = [task.sample(samples, seed=2_000_003 + seed) for task, seed in zip(tasks, seeds, strict=True)]
    return torch.stack([x for x, _, _ in drawn]), torch.stack([y for _, y, _ in drawn])


def _measure(nets: Networks, tasks: Sequence[Task], seeds: Sequence[int], classifiers: bool) -> list[dict[str, float]]:
    """The last hidden layer of every network, on the noise-free condition means of its task."""
    with torch.no_grad():
        hidden = nets.hidden(torch.stack([torch.from_numpy(task.means).float() for task in tasks]))[-1].numpy()
    return [
        layer_geometry(z, task.means, task.labels, classifiers=classifiers, seed=seed)
        for z, task, seed in zip(hidden, tasks, seeds, strict=True)
    ]


def _theory(tasks: Sequence[Task], f: Nonlinearity, scales: Sequence[float]) -> list[float]:
    pairs = zip(tasks, scales, strict=True)
    return [label_share(task.means, task.labels, f, noise=task.noise, scale=scale) for task, scale in pairs]


def _first_step(nets: Networks, tasks: Sequence[Task], x: Tensor, y: Tensor, likelihood: str) -> np.ndarray:
    nets = copy.deepcopy(nets)
    means, labels = np.stack([task.means for task in tasks]), np.stack([task.labels for task in tasks])
    return measured_label_share(nets, x, y, means, labels, likelihood)


def _place(losses: Float[np.ndarray, "checks networks"], level: float | None) -> Int[np.ndarray, " networks"]:
    """The check at which each network was kept: the first below the level, else the last."""
    last = len(losses) - 1
    if level is None:
        return np.full(losses.shape[1], last)
    below = losses < level
    return np.where(below.any(0), below.argmax(0), last)


def _stacked(rows: Sequence[Sequence[dict[str, float]]]) -> Measures:
    return {name: np.array([[one[name] for one in row] for row in rows]) for name in rows[0][0]}
