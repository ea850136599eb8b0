"""Why one input got its class: the reference cases, the nearest first, and what each added to the score.

An `Explanation` is what `PrototypeClassifier.explain` gives for a row. Printed, it is a table; `sheet()` draws it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, AGAINST = "#0b6e99", "#b5483a"


@dataclass(frozen=True)
class Reference:
    """One prototype as a reference case for one input."""

    prototype: int
    distance: float  # squared, between codes
    weight: float  # of the explained class
    contribution: float  # weight * distance: what it adds to the score of the explained class
    stands_for: Any  # the class whose score falls most with the distance: a case near the prototype is one of it
    decoded: np.ndarray | None  # the prototype as an input, where there is a decoder
    nearest: int  # row of the training data whose code is nearest to the prototype
    nearest_label: Any
    nearest_distance: float  # squared, from the prototype to that row's code
    case: np.ndarray  # that row


@dataclass(frozen=True)
class Explanation:
    """Prediction for one input, with the reference cases in order of their distance."""

    x: np.ndarray
    predicted: Any
    of: Any  # the class whose score `references` and `score` explain
    score: float  # its logit: the sum of all contributions
    probabilities: dict[Any, float]
    contributions: Float[np.ndarray, "k m"]  # of every prototype to every class
    references: tuple[Reference, ...]

    def __str__(self) -> str:
        lines = [
            f"predicted {self.predicted} ({self.probabilities[self.predicted]:.1%}); "
            f"score of {self.of}: {self.score:.4g}",
            "prototype  stands for    distance      weight  contribution  nearest training row",
        ]
        lines += [
            f"{r.prototype:9d}  {r.stands_for!s:10.10}  {r.distance:10.4g}  {r.weight:10.4g}  {r.contribution:12.4g}  "
            f"{r.nearest} ({r.nearest_label})"
            for r in self.references
        ]
        return "\n".join(lines)

    def sheet(self, shown: int = 5) -> Figure:
        """The input beside its nearest prototypes, decoded and as training images, with contributions below.

        Raises ValueError where inputs are no images (channels, height, width) of one or three channels.
        """
        if self.x.ndim != 3 or self.x.shape[0] not in (1, 3):
            raise ValueError(
                f"a sheet needs images of 1 or 3 channels, and this input has shape {self.x.shape}; "
                "give image_shape to the classifier, or print the explanation"
            )
        references = self.references[: max(1, shown)]
        figure = Figure(figsize=(1.7 * (len(references) + 1) + 0.6, 5.6), layout="constrained")
        grid = figure.add_gridspec(3, len(references) + 1, height_ratios=(1, 1, 0.9))
        self._input(figure.add_subplot(grid[0, 0]))
        for column, reference in enumerate(references, 1):
            _decoded(figure.add_subplot(grid[0, column]), reference)
            panel = figure.add_subplot(grid[1, column])
            picture(panel, reference.case)
            panel.set_title(f"training row {reference.nearest}\n{reference.nearest_label}", fontsize="small")
        self._bars(figure.add_subplot(grid[2, :]))
        return figure

    def _input(self, panel: Axes) -> None:
        picture(panel, self.x)
        panel.set_title(f"input: {self.predicted}\n{self.probabilities[self.predicted]:.0%}", fontsize="small")

    def _bars(self, panel: Axes) -> None:
        values = [r.contribution for r in self.references]
        panel.bar(range(len(values)), values, color=[OURS if v > 0 else AGAINST for v in values])
        panel.axhline(0, color="#333", linewidth=0.8)
        names = [f"{r.prototype}\n{r.stands_for!s:.9}" for r in self.references]
        panel.set_xticks(range(len(values)), names, fontsize="x-small", rotation=90 if len(values) > 12 else 0)
        panel.set(xlabel="prototype, the nearest first", ylabel=f"contribution to\n{self.of}")
        panel.spines[["top", "right"]].set_visible(False)


def explanations(
    classifier: Any,
    inputs: np.ndarray,
    contributions: Float[np.ndarray, "n k m"],
    distances: Float[np.ndarray, "n m"],
    shares: Float[np.ndarray, "n k"],
    of: int | None,
) -> list[Explanation]:
    """One for each input, of class number `of` or of the predicted one; `shares` are probabilities."""
    labels, decoded = classifier.classes_.tolist(), classifier.decode_prototypes()
    weights, stands_for = classifier.weights_, classifier.prototype_classes_

    def reference(j: int, k: int, parts: np.ndarray, d: np.ndarray) -> Reference:
        return Reference(
            prototype=j,
            distance=float(d[j]),
            weight=float(weights[k, j]),
            contribution=float(parts[k, j]),
            stands_for=stands_for[j],
            decoded=None if decoded is None else decoded[j],
            nearest=int(classifier.nearest_[j, 0]),
            nearest_label=classifier.nearest_labels_[j, 0],
            nearest_distance=float(classifier.nearest_distances_[j, 0]),
            case=classifier.cases_[j, 0],
        )

    out = []
    for x, parts, d, share in zip(inputs, contributions, distances, shares, strict=True):
        predicted = int(share.argmax())
        k = predicted if of is None else of
        references = tuple(reference(int(j), k, parts, d) for j in d.argsort(kind="stable"))
        probabilities = dict(zip(labels, share.tolist(), strict=True))
        out.append(
            Explanation(x, labels[predicted], labels[k], float(parts[k].sum()), probabilities, parts, references)
        )
    return out


def picture(panel: Axes, image: np.ndarray) -> None:
    """An image (channels, height, width), grey or in colour."""
    panel.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), cmap="gray_r", vmin=0, vmax=1)
    panel.set_xticks([])
    panel.set_yticks([])


def _decoded(panel: Axes, reference: Reference) -> None:
    title = f"prototype {reference.prototype}\n{reference.stands_for}, d = {reference.distance:.3g}"
    panel.set_title(title, fontsize="small")
    if reference.decoded is None:
        panel.axis("off")
        panel.text(0.5, 0.5, "no decoder", ha="center", va="center", transform=panel.transAxes)
    else:
        picture(panel, reference.decoded)
