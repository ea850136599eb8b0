"""What the neurons of a vision model do on a set of images: the columns of its atlas.

There is no vocabulary to read a neuron by. So a probe of images (`neuropil.data.probe`) is shown to the model, and of
each neuron is told how it answers (`Activity`) and which images and regions drive it (`Exemplars`, the first step of
MILAN). What the model loses without it is told by `neuropil.ablation`.

>>> import torch
>>> from torch import nn
>>> from neuropil.data import Probe
>>> from neuropil.models import load
>>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
>>> images = Probe("noise", torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), ("noise",) * 40)
>>> model = load(net)
>>> sorted(Activity(model, images).columns(model.sites[0]))[:4]
['activation_max', 'activation_mean', 'dead', 'down_norm']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neuropil._taps import tapped
from neuropil.errors import ModelError
from neuropil.neurons import Site

if TYPE_CHECKING:
    from neuropil.data import Probe
    from neuropil.interpret.milan import ExemplarSet
    from neuropil.models import ImageInput, Model

SIDE = 14  # cells a side of the kept regions
STATE = 1 << 26  # numbers that one pass over the images may keep


def as_rows(h: Tensor, axis: int, images: int) -> Float[Tensor, "images width places"]:
    """The activations of a site as images x neurons x places, wherever its neurons lie."""
    h = h.movedim(axis, -1)
    if h.shape[0] % images:
        raise ModelError(
            f"activations of {list(h.shape)} for {images} images: which image each belongs to is not known"
        )
    return h.reshape(images, -1, h.shape[-1]).transpose(1, 2).float()


class Prepared:
    """A model, the images it is shown, and how it is run on them."""

    def __init__(self, model: Model, images: Probe, batch_size: int) -> None:
        self.model, self.images, self.batch_size = model, images, batch_size
        self.input: ImageInput = prepared(model, images)
        self.module: nn.Module = model.module()

    def batches(self, chosen: Sequence[int] | None = None) -> Iterator[tuple[int, Tensor]]:
        """Where each batch begins, and what the model is given."""
        pixels = self.images.pixels if chosen is None else self.images.pixels[list(chosen)]
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        for start in range(0, len(pixels), self.batch_size):
            yield start, self.input(pixels[start : start + self.batch_size]).to(device)


def prepared(model: Model, images: Probe) -> ImageInput:
    """How the model takes these images. Raises ModelError for a model that takes none, or others."""
    found = model.takes_images
    size = (int(images.pixels.shape[2]), int(images.pixels.shape[3]))
    if found is None:
        raise ModelError(f"{model.name} ({model.architecture}) takes no images, so it cannot be probed with any")
    found = found.fitted(size)
    if (found.channels, found.size) != (images.pixels.shape[1], size):
        raise ModelError(
            f"{model.name} takes images {[found.channels, *(found.size or ())]}, the probe {images.name!r} has "
            f"{list(images.pixels.shape[1:])}; make it with probe(..., channels=, size=)"
        )
    return found


def inputs(model: Model, images: Probe, pixels: int = 1 << 20) -> list[Float[Tensor, "_ ..."]]:
    """What the model is given for these images, in batches of so many pixels (of one image at least).

    >>> from neuropil.data import probe
    >>> from neuropil.models import load
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    >>> [len(x) for x in inputs(load(net), probe("digits", 1, (8, 8), limit=50), pixels=20 * 64)]
    [20, 20, 10]
    """
    high, wide = images.pixels.shape[2:]
    run = Prepared(model, images, max(1, pixels // (high * wide)))
    return [x for _, x in run.batches()]


# ------------------------------------------------------------------------------------------------ activity


@dataclass
class _Tally:
    """What one pass keeps of a site: a row an image."""

    mean: Tensor
    positive: Tensor
    top: Tensor
    low: Tensor
    above: Tensor
    batch: tuple[Tensor, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, images: int, width: int) -> _Tally:
        mean, positive, top, low, above = torch.zeros(5, images, width)
        return cls(mean, positive, top, low, above)


class Activity:
    """How each neuron answers to the images.

    Columns, over all places of all images: `activation_mean`, `activation_max`, `sparsity` (share of places where it
    is not above zero), `dead` (one value everywhere), and `up_norm`, `gate_norm`, `down_norm`, the lengths of its
    weight vectors. With classes, by the mean over an image of the activation's positive part:
    `preferred_class`, the class with the largest mean m, and `selectivity` = (m - r) / (m + r), r the mean of all
    other images: 0 where all classes are alike, 1 where only one drives it (Morcos et al. 2018, arXiv 1803.06959).

    One pass over the images serves as many sites as keep 2^26 numbers, so memory does not grow with the model.
    """

    def __init__(self, model: Model, images: Probe, batch_size: int = 16) -> None:
        self._run = Prepared(model, images, batch_size)
        self.settings: dict[str, Any] = images.settings
        self._kept: dict[str, _Tally] = {}

    def columns(self, site: Site) -> dict[str, Any]:
        """The columns of one site; the following ones are looked at in the same pass."""
        if site.name not in self._kept:
            each = 5 * len(self._run.images)
            sites = self._run.model.sites[site.number :]
            self._kept = self._pass(_group(sites, lambda s: s.width * each))
        tally, model = self._kept.pop(site.name), self._run.model
        made: dict[str, Any] = {
            "activation_mean": tally.mean.mean(0),
            "activation_max": tally.top.amax(0),
            "sparsity": 1 - tally.above.mean(0),
            "dead": (tally.top.amax(0) - tally.low.amin(0)) <= 1e-6 * (1 + tally.top.amax(0).abs()),
        }
        for role in site.roles:
            made[f"{role}_norm"] = model.rows(site, role).norm(dim=1)
        images = self._run.images
        if images.labels is not None and len(images.classes) > 1:
            best, index = selectivity(tally.positive, images.labels, len(images.classes))
            silent = tally.positive.amax(0) <= 0
            made["preferred_class"] = [
                None if off else images.classes[k] for k, off in zip(best.tolist(), silent.tolist(), strict=True)
            ]
            made["selectivity"] = index
        return made

    def _pass(self, sites: list[Site]) -> dict[str, _Tally]:
        run, count = self._run, len(self._run.images)
        tallies = {s.name: _Tally.of(count, s.width) for s in sites}
        size = 0

        def see(site: Site) -> Callable[[Tensor], None]:
            def act(h: Tensor) -> None:
                rows = as_rows(h.detach(), site.tap.axis, size).cpu()
                tallies[site.name].batch = (
                    rows.mean(2), rows.clamp(min=0).mean(2), rows.amax(2), rows.amin(2), (rows > 0).float().mean(2),
                )  # fmt: skip

            return act

        with torch.inference_mode(), tapped(run.module, [(s.tap, s.width, see(s)) for s in sites]):
            for start, x in run.batches():
                size = len(x)
                run.module(x)
                for site in sites:
                    tally = tallies[site.name]
                    if not tally.batch:
                        raise ModelError(
                            f"{site.name} did not run on these images; the model has parts that need others"
                        )
                    held = (tally.mean, tally.positive, tally.top, tally.low, tally.above)
                    for whole, part in zip(held, tally.batch, strict=True):
                        whole[start : start + size] = part
                    tally.batch = ()
        return tallies


def selectivity(
    values: Float[Tensor, "images width"], labels: Int[Tensor, " images"], classes: int
) -> tuple[Int[Tensor, " width"], Float[Tensor, " width"]]:
    """The class that drives each neuron most, and how much more than the others together.

    >>> values = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.0, 0.0]])
    >>> selectivity(values, torch.tensor([0, 1, 2]), 3)
    (tensor([0, 0]), tensor([0., 1.]))
    """
    counts = torch.bincount(labels, minlength=classes).unsqueeze(1)
    sums = torch.zeros(classes, values.shape[1]).index_add_(0, labels, values)
    means = torch.where(counts > 0, sums / counts.clamp(min=1), -torch.inf)
    most, best = means.max(0)
    own = counts[best, 0]
    rest = (sums.sum(0) - sums.gather(0, best.unsqueeze(0))[0]) / (len(values) - own).clamp(min=1)
    whole = most + rest
    return best, torch.where(whole > 0, (most - rest) / whole.clamp(min=1e-30), 0.0).clamp(0, 1)


# ----------------------------------------------------------------------------------------------- exemplars


EXEMPLAR_TYPES = {
    "exemplar_images": pa.list_(pa.int32()),
    "exemplar_values": pa.list_(pa.float32()),
    "exemplar_masks": pa.list_(pa.string()),
}


class Exemplars:
    """The images that drive each neuron most, and where on them, by MILAN's first step.

    Columns: `exemplar_images` (places in the probe, best first), `exemplar_values` (the peak on each),
    `exemplar_masks` (for each a text of 14 x 14 hexadecimal digits, row by row: how much of that cell of the image
    lies in the region, 0 none and f all of it), `threshold` (the 0.99 quantile of the neuron's activation over all
    places of all images, above which a place lies in the region).

    One pass over the images serves as many sites as keep 2^26 numbers.
    """

    def __init__(self, model: Model, images: Probe, k: int = 15, batch_size: int = 16, quantile: float = 0.99) -> None:
        self._run, self.k, self.quantile = Prepared(model, images, batch_size), min(k, len(images)), quantile
        self.settings = {**images.settings, "k": self.k, "quantile": quantile, "side": SIDE}
        self._places: dict[str, int] = {}
        self._kept: dict[str, ExemplarSet] = {}

    def columns(self, site: Site, dead: Sequence[bool] | None = None) -> dict[str, Any]:
        """The columns of one site; of its dead neurons no image tells more than another, and their lists are empty."""
        held = self._regions(site).compact(SIDE)
        lists = {
            "exemplar_images": held["image_ids"].tolist(),
            "exemplar_values": held["values"].tolist(),
            "exemplar_masks": digits(held["masks"]),
        }
        silent = [False] * site.width if dead is None else dead
        for values in lists.values():
            values[:] = [[] if off else each for each, off in zip(values, silent, strict=True)]
        return {"threshold": held["threshold"], **lists}

    def found(self, site: Site) -> ExemplarSet:
        """The exemplars of one site with their pictures."""
        held = self._regions(site)
        shown = held.image_ids.unique()
        return replace(held, stored_ids=shown, stored=self._run.images.pixels[shown])

    def _regions(self, site: Site) -> ExemplarSet:
        """Without pictures; the following sites are looked at in the same pass."""
        if site.name not in self._kept:
            self._kept = self._pass(_group(self._run.model.sites[site.number :], self._numbers))
        return self._kept.pop(site.name)

    def _pass(self, sites: list[Site]) -> dict[str, ExemplarSet]:
        from neuropil.interpret.milan import regions

        shown = (x for _, x in self._run.batches())
        return {e.layer: e for e in regions(self._run.module, shown, sites, k=self.k, quantile=self.quantile)}

    def _numbers(self, site: Site) -> int:
        """How many are kept of a site: of each neuron its best maps, and its values until they are counted in bins."""
        from neuropil.interpret.milan.running import CAPACITY

        if not self._places:
            self._places = self._counted()
        places = self._places.get(site.name, 1)
        return site.width * (self.k * places + min(len(self._run.images) * places, CAPACITY))

    def _counted(self) -> dict[str, int]:
        """At how many places of an image the neurons of each site are."""
        found: dict[str, int] = {}

        def see(site: Site) -> Callable[[Tensor], None]:
            def act(h: Tensor) -> None:
                found[site.name] = h.numel() // site.width

            return act

        run = self._run
        with torch.inference_mode(), tapped(run.module, [(s.tap, s.width, see(s)) for s in run.model.sites]):
            run.module(next(run.batches([0]))[1])
        return found


def _group(sites: Sequence[Site], numbers: Callable[[Site], int]) -> list[Site]:
    """The first of the sites and those after it, as many as one pass may serve."""
    chosen: list[Site] = []
    room = STATE
    for site in sites:
        room -= numbers(site)
        if chosen and room < 0:
            break
        chosen.append(site)
    return chosen


def digits(masks: Tensor) -> list[list[str]]:
    """Masks `[units, k, side, side]` of bytes as texts of hexadecimal digits.

    >>> digits(torch.tensor([[[[0, 255], [128, 16]]]], dtype=torch.uint8))
    [['0f81']]
    """
    codes = (masks >> 4).flatten(2).numpy()
    letters = [[row.tobytes().hex()[1::2] for row in unit] for unit in codes]
    return letters
