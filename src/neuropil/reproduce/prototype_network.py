"""Deep learning for case-based reasoning through prototypes (Li et al. 2018, arXiv:1710.04806).

The paper's convolutional network with 15 prototypes learns Fashion-MNIST with all four terms of its loss, without R1,
without R2, without both and without the autoencoder; a plain network has the same encoder and a dense layer in the
prototypes' place. What the paper shows in pictures is measured: do decoded prototypes look like data, do data lie near
prototypes.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.neighbors import KNeighborsClassifier

from neuropil import data
from neuropil.interpret import PrototypeClassifier
from neuropil.interpret.prototype_quality import prototype_quality
from neuropil.report import Measurement, Report, Row, Scale, find, paired
from neuropil.reproduce.figures import BASELINE, OURS
from neuropil.reproduce.harness import Meter, runner

CLAIM = (
    "A classifier that scores an input by its distances to a few learned prototypes loses next to no accuracy, and its "
    "terms R1 and R2 keep the prototypes like the data and the data near the prototypes."
)
RULE = (
    "(1) Test accuracy of the plain network less that of the full one, mean over seeds. (2) Realism without R1, as a "
    "multiple of the full network's. (3) Coverage without R2, as a multiple of the full network's. (4) The same two "
    "without both terms. Multiples are geometric means over seeds. Realism is the squared distance of a decoded "
    "prototype to the training image most like it, as a multiple of the same for reconstructed test images; coverage "
    "is the squared distance of a test code to the nearest prototype, by the mean between two codes. Holds if (1) is "
    "at most 1.5 points and all four multiples are 1.5 or more; does not hold if (1) exceeds 3 points, or (2) and (3) "
    "are both below 1.5; partly otherwise. A seed that failed counts as not holding."
)
PAPER_SAYS = (
    "MNIST, 15 prototypes: the test accuracy of the same convolutional network without prototypes, near 99.2 %, is "
    "reached to within a tenth of a point",
    "Fashion-MNIST, 15 prototypes: near 90 % on the test images",
    "rendered cars: without R1 and R2 decoded prototypes are no cars any more, while the accuracy stays (pictures)",
)
DEVIATIONS = (
    "10,000 images and 20 epochs instead of 55,000 images and 1500 epochs; batches of 50 instead of 250, for more "
    "steps; no elastic deformation",
)
NOTES = (
    "Without R the decoder learns nothing: its reconstructions are no more like data than its prototypes, and a "
    "realism near 1 there says nothing.",
    "What the terms are for is found: all four multiples of the rule exceed 1.5, and leaving R1 and R2 out gains "
    "half a point of accuracy at most. What is missing is a hair of accuracy, and it is missing for want of "
    "training: with 1,200 steps, at which this was first measured, the full network was five points behind the "
    "plain one and the claim did not hold; with 8,000 steps (two seeds, once) it is behind by half a point. "
    "Prototypes and the weights of their distances begin at random in (0, 1), and every prototype must first turn "
    "one of its weights negative.",
    "In one seed the autoencoder alone ended with codes that are all the same, and its class means tell nothing.",
)
SEEDS: dict[Scale, tuple[int, ...]] = {"smoke": (0,), "default": (0, 1, 2), "paper": (0, 1, 2, 3, 4)}
SETTINGS: dict[Scale, dict[str, Any]] = {
    "smoke": {"data": "digits", "images": 1437, "epochs": 8, "batch": 50, "lr": 0.01, "elastic": False},
    "default": {"data": "fashion-mnist", "images": 10_000, "epochs": 20, "batch": 50, "lr": 0.002, "elastic": False},
    "paper": {"data": "fashion-mnist", "images": 60_000, "epochs": 1500, "batch": 250, "lr": 0.002, "elastic": True},
}
FULL, NO_R1, NO_R2, NEITHER, NO_AE = "all four terms", "without R1", "without R2", "without R1 and R2", "without R"
PLAIN, ALONE, KNN = "plain network", "nearest class mean, autoencoder's codes", "5 nearest neighbours, pixels"
ARMS: dict[str, dict[str, Any]] = {
    FULL: {},
    NO_R1: {"lambda_1": 0.0},
    NO_R2: {"lambda_2": 0.0},
    NEITHER: {"lambda_1": 0.0, "lambda_2": 0.0},
    NO_AE: {"lambda_ae": 0.0},
    PLAIN: {"head": "dense"},
    ALONE: {"lambda_class": 0.0, "lambda_1": 0.0, "lambda_2": 0.0},
}
WITH_PROTOTYPES = (FULL, NO_R1, NO_R2, NEITHER, NO_AE)
ACCURACY = "test accuracy"
MISFIT, REALISM = "decoded prototype to the training image most like it", "realism"
COVERAGE, REMOTENESS, CLOSEST = "coverage", "prototype to nearest code", "closest two prototypes"
CLASSES, AGREEMENT = "classes with a prototype", "decoded prototypes that look their class"
HELD, BROKEN, LOST, REFUTED = 1.5, 1.5, 1.5, 3.0  # of the rule


def measure(scale: Scale, seed: int, progress: Meter) -> list[Measurement]:
    train_x, train_y, test_x, test_y = images(scale)
    jobs = 1 if scale == "smoke" else os.cpu_count()  # a network this small gains nothing from a second thread
    done = Parallel(n_jobs=jobs, return_as="generator")(delayed(_arm)(arm, scale, seed) for arm in ARMS)
    rows: list[Measurement] = []
    for arm in progress.track(list(ARMS), "training"):
        _fitted[arm, scale, seed], measured = next(done)
        rows += measured
    neighbours = KNeighborsClassifier().fit(train_x.reshape(len(train_x), -1), train_y)
    right = float(neighbours.score(test_x.reshape(len(test_x), -1), test_y))
    return [*rows, Measurement(KNN, ACCURACY, 100 * right, "%", True, True)]


def _arm(arm: str, scale: Scale, seed: int) -> tuple[PrototypeClassifier, list[Measurement]]:
    """One network, trained and measured."""
    train_x, train_y, test_x, test_y = images(scale)
    fitted = train(arm, scale, seed)
    if arm == ALONE:
        right = nearest_mean(fitted.encode(train_x), train_y, fitted.encode(test_x), test_y)
    else:
        right = float((fitted.predict(test_x) == test_y).mean())
    rows = [Measurement(arm, ACCURACY, 100 * right, "%", True, arm in (PLAIN, ALONE))]
    return fitted, rows + (_quality(arm, fitted, train_x, train_y, test_x) if arm in WITH_PROTOTYPES else [])


def _quality(
    arm: str, fitted: PrototypeClassifier, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray
) -> list[Measurement]:
    found = prototype_quality(fitted, train_x, train_y, test_x)
    values: list[tuple[str, float, str, bool]] = [
        (REALISM, found.realism, "x reconstructions", False),
        (COVERAGE, found.coverage, "x mean between codes", False),
        (REMOTENESS, found.remoteness, "x mean between codes", False),
        (MISFIT, found.misfit, "squared grey levels", False),
        (CLOSEST, found.closest_pair, "x mean between codes", True),
        (CLASSES, float(found.classes), "", True),
        (AGREEMENT, 100 * found.agreement, "%", True),
    ]
    return [Measurement(arm, metric, value, unit, better, arm != FULL) for metric, value, unit, better in values]


def nearest_mean(codes: np.ndarray, labels: np.ndarray, others: np.ndarray, wanted: np.ndarray) -> float:
    """Accuracy of the class whose mean code is nearest; scikit-learn's refuses codes that have all fallen together."""
    means = np.stack([codes[labels == label].mean(0) for label in np.unique(labels)])
    found = np.square(others[:, None] - means).sum(2).argmin(1)
    return float((np.unique(labels)[found] == wanted).mean())


def images(scale: Scale) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and test images [n, 1, height, width] with their labels."""
    settings = SETTINGS[scale]
    found = data.image_set(settings["data"])
    count = settings["images"]
    parts = (found.train_x[:count], found.train_y[:count], found.test_x, found.test_y)
    return tuple(part.numpy() for part in parts)  # type: ignore[return-value]


_fitted: dict[tuple[str, Scale, int], PrototypeClassifier] = {}  # for the figure, which shows those of the first seed


def train(arm: str, scale: Scale, seed: int) -> PrototypeClassifier:
    """The network of an arm."""
    settings = SETTINGS[scale]
    train_x, train_y, _, _ = images(scale)
    made = PrototypeClassifier(
        encoder="conv",
        epochs=settings["epochs"],
        batch_size=settings["batch"],
        lr=settings["lr"],
        augment="elastic" if settings["elastic"] else None,
        random_state=seed,
        **ARMS[arm],
    )
    return made.fit(train_x, train_y)


# --- verdict and figure --------------------------------------------------------------------------


def multiple(rows: Sequence[Row], arm: str, metric: str) -> float:
    """Of the full network's, geometric mean over seeds; NaN where a seed failed."""
    pairs = zip(find(rows, arm, metric).values, find(rows, FULL, metric).values, strict=True)
    shares = [a / b if b else math.nan for a, b in pairs]
    return statistics.geometric_mean(shares) if all(share > 0 for share in shares) else math.nan


def multiples(rows: Sequence[Row]) -> dict[str, float]:
    """(2), (3) and (4) of the rule."""
    asked = ((NO_R1, REALISM), (NO_R2, COVERAGE), (NEITHER, REALISM), (NEITHER, COVERAGE))
    return {f"{metric} {arm}": multiple(rows, arm, metric) for arm, metric in asked}


def verdict(rows: Sequence[Row]) -> str:
    """The rule above, as code; a pure function of the rows."""
    lost, _ = paired(find(rows, PLAIN, ACCURACY).values, find(rows, FULL, ACCURACY).values)
    found = list(multiples(rows).values())
    if not lost <= REFUTED or not (found[0] >= BROKEN or found[1] >= BROKEN):
        return "does not hold"
    return "holds" if lost <= LOST and all(value >= HELD for value in found) else "partly"


def figure(report: Report) -> Figure:
    """Above: prototypes of the first seed, decoded, of each arm. Below: accuracy, realism and coverage."""
    scale, seed = report.scale, report.seeds[0]
    fitted = {arm: _fitted.get((arm, scale, seed)) or train(arm, scale, seed) for arm in WITH_PROTOTYPES}
    count = len(fitted[FULL].prototypes_)
    out = Figure(figsize=(13, 9.2), layout="constrained")
    above, below = np.asarray(out.subfigures(2, 1, height_ratios=(1.45, 1)))
    panels = above.subplots(len(fitted) + 1, count)
    names = data.image_set(report.settings["data"]).classes
    for line, (arm, one) in zip(panels[1:], fitted.items(), strict=True):
        decoded = one.decode_prototypes()
        assert decoded is not None
        _line(line, decoded[_by_class(one)], arm)
    order = _by_class(fitted[FULL])
    _line(panels[0], fitted[FULL].cases_[order, 0], "training images nearest\nto those of all four terms")
    for panel, label in zip(panels[0], fitted[FULL].prototype_classes_[order], strict=True):
        panel.set_title(names[label].replace(" ", "\n"), fontsize="x-small")
    title = f"prototype-network on {report.settings['data']}: {report.verdict}"
    above.suptitle(
        f"{title}. Prototypes decoded (seed {seed}), each line in the order of its classes", fontsize="medium"
    )
    shown = (
        (ACCURACY, "test accuracy (%)", "Accuracy"),
        (MISFIT, "squared distance to the most similar\ntraining image", "Decoded prototypes like data?"),
        (REALISM, "the same, x that of reconstructions", "... as reconstructions are?"),
        (COVERAGE, "squared distance to a prototype,\nx mean between codes", "Test codes near prototypes?"),
    )
    for panel, (metric, label, name) in zip(below.subplots(1, 4), shown, strict=True):
        _dots(panel, report, metric, label, name)
        if metric != ACCURACY:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
    return out


def _by_class(fitted: PrototypeClassifier) -> np.ndarray:
    return fitted.prototype_classes_.argsort(kind="stable")


def _line(panels: np.ndarray, pictures: np.ndarray, name: str) -> None:
    for panel, picture in zip(panels, pictures, strict=True):
        panel.imshow(picture[0], cmap="gray_r", vmin=0, vmax=1)
        panel.set_xticks([])
        panel.set_yticks([])
    panels[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")


def _dots(panel: Axes, report: Report, metric: str, label: str, title: str) -> None:
    # Without R nothing learns to decode: reconstructions are no measure there.
    rows = [row for row in report.rows if row.metric == metric and (metric, row.name) != (REALISM, NO_AE)][::-1]
    for height, row in enumerate(rows):
        colour = OURS if row.name == FULL else BASELINE
        panel.errorbar(row.mean, height, xerr=row.spread or 0, fmt="o", color=colour, capsize=3)
        panel.plot(row.values, [height + 0.2] * len(row.values), ".", color=colour, alpha=0.4)
    panel.set_yticks(range(len(rows)), [row.name.replace(", ", ",\n") for row in rows])
    panel.set(xlabel=label, title=title, ylim=(-0.5, len(rows) - 0.3))
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


run = runner(__name__)
