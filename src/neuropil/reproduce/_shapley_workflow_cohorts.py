"""Simulated cohorts of a memory clinic, with known importances, and pairs of real ones.

ADNI, AIBL and OASIS are given out on request only. The simulation has their shape: volumes of ten regions on both
sides, four test scores, age, sex and ApoE count; a training cohort and two others with other scanners, ages and
prevalence. Severity is linear in the columns, so that the true Shapley values of a column are its weight times its
distance from the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

# Region: how much atrophy shrinks it, and its own weight in severity (both in standard deviations).
REGIONS = {
    "hippocampus": (0.8, -0.9),
    "amygdala": (0.75, -0.7),
    "entorhinal": (0.75, -0.5),
    "ventricle": (-0.7, 0.4),
    "temporal": (0.6, -0.3),
    "parietal": (0.5, -0.15),
    "cingulate": (0.5, 0.0),
    "thalamus": (0.3, 0.0),
    "caudate": (0.2, 0.0),
    "putamen": (0.2, 0.0),
}
SCORES = {"memory": (0.8, -1.0), "attention": (0.6, -0.3), "fluency": (0.6, -0.2), "naming": (0.5, 0.0)}
OTHERS = {"age": 0.3, "apoe4": 0.4, "male": 0.0}
TASKS = {"CN vs AD": ("CN", "AD"), "CN vs MCI": ("CN", "MCI"), "sMCI vs pMCI": ("sMCI", "pMCI")}
SIDE_NOISE = 0.33  # of one side against the mean of both: within a pair r is 1 / (1 + 0.33^2), about 0.9


@dataclass(frozen=True)
class Cohort:
    """A table, the diagnosis (CN, MCI, AD), for MCI what became of it (sMCI, pMCI; "" for others), and the true
    Shapley values `[n, columns]` of severity."""

    X: Any
    diagnosis: np.ndarray
    course: np.ndarray
    truth: np.ndarray

    def task(self, name: str) -> tuple[Any, np.ndarray, np.ndarray]:
        """The rows of a task: table, 1 for the worse of the two, and true values."""
        mild, severe = TASKS[name]
        label = self.course if name == "sMCI vs pMCI" else self.diagnosis
        rows = np.isin(label, [mild, severe])
        return self.X[rows].reset_index(drop=True), (label[rows] == severe).astype(int), self.truth[rows]


def simulated(
    n: int,
    rng: np.random.Generator,
    *,
    age: float = 73.0,
    scanner: float = 0.0,
    cuts: tuple[float, float] = (-0.5, 2.5),
) -> Cohort:
    """`n` subjects: mean `age`, regional gains of standard deviation `scanner`, and thresholds of MCI and AD."""
    import pandas

    atrophy = rng.standard_normal(n)
    cognition = -0.6 * atrophy + 0.8 * rng.standard_normal(n)
    years = rng.normal(age, 7, n)
    old = (years - 73) / 7
    columns: dict[str, np.ndarray] = {}
    parts: dict[str, np.ndarray] = {}
    head = rng.normal(1.5, 0.15, n)
    for name, (loading, weight) in REGIONS.items():
        noise = np.sqrt(1 - loading**2)
        middle = -loading * atrophy + noise * rng.standard_normal(n) - 0.2 * old
        gain = 1 + scanner * rng.standard_normal()
        for side in ("left", "right"):
            size = middle + SIDE_NOISE * rng.standard_normal(n)
            volume = (10 + size) * head * gain  # what is measured; a larger head has larger regions
            columns[f"{side} {name}"] = volume / (head * rng.normal(1, 0.01, n))
            parts[f"{side} {name}"] = weight / 2 * size
    for name, (loading, weight) in SCORES.items():
        score = loading * cognition + np.sqrt(1 - loading**2) * rng.standard_normal(n)
        columns[name], parts[name] = 20 + 4 * score, weight * score
    columns["age"], parts["age"] = years, OTHERS["age"] * old
    columns["apoe4"] = rng.choice(3, n, p=[0.6, 0.33, 0.07]).astype(float)
    columns["male"] = rng.integers(2, size=n).astype(float)
    parts["apoe4"], parts["male"] = OTHERS["apoe4"] * columns["apoe4"], OTHERS["male"] * columns["male"]
    truth = np.column_stack(list(parts.values()))
    severity = truth.sum(1)
    seen = severity + rng.logistic(0, 0.7, n)
    diagnosis = np.where(seen < cuts[0], "CN", np.where(seen < cuts[1], "MCI", "AD"))
    worsens = severity + rng.logistic(0, 0.7, n) > np.mean(cuts)
    course = np.where(diagnosis == "MCI", np.where(worsens, "pMCI", "sMCI"), "")
    return Cohort(pandas.DataFrame(columns), diagnosis, course, truth - truth.mean(0))


def clinic(n: int, seed: int) -> dict[str, Cohort]:
    """Cohort A to train on, its held-out subjects, and B and C: other scanners, older, more or fewer ill."""
    rng = np.random.default_rng([seed, 2022])
    return {
        "A": simulated(n, rng),
        "A, held out": simulated(n // 2, rng),
        "B": simulated(3 * n // 8, rng, age=76.0, scanner=0.02, cuts=(0.0, 3.0)),
        "C": simulated(3 * n // 8, rng, age=75.0, scanner=0.02, cuts=(-1.0, 2.0)),
    }
