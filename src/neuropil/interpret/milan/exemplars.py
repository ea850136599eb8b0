"""The image regions that drive each unit of a layer: its exemplars.

For unit c with maps A over a probe of images, the exemplars are the k = 15 images with the largest max A, and on each
the region where the map, laid over the image, exceeds the unit's own 0.99 quantile over all places of all images:

    eta = quantile_{0.99} A          mask = 1[ upsample(A) > eta ]         (bilinear)

>>> import torch
>>> from torch import nn
>>> torch.manual_seed(0) and None
>>> net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
>>> found = exemplars(net, torch.rand(40, 3, 8, 8), "2")
>>> found.image_ids.shape, found.masks().shape, found.pictures().shape
(torch.Size([4, 15]), torch.Size([4, 15, 1, 8, 8]), torch.Size([4, 15, 3, 8, 8]))
>>> found.compact(4)["masks"].shape
torch.Size([4, 15, 4, 4])

The probe is a tensor, a data set or any iterable of batches; it is gone through once, and what is kept does not grow
with it (`running`). In exact figures: k maps, k picture references and one sketch a unit, and every picture that some
unit refers to, once, as bytes. The quantile is exact up to 16,384 places, after that within `threshold_error`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from neuropil.errors import ModelError
from neuropil.interpret.milan.layer import Reshape, as_maps, check_layer, seen_layer
from neuropil.interpret.milan.running import BINS, CAPACITY, RunningQuantile, RunningTopK
from neuropil.neurons import Site

K, QUANTILE = 15, 0.99
DIMMED = 0.25  # brightness outside the region in pictures


@dataclass(frozen=True)
class ExemplarSet:
    """What drives the `units` of `layer`, one row a unit, best image first.

    `stored` holds each picture once, as bytes; `stored_ids` tells their places in the probe. `flat` layers have no
    places (fully connected): their regions are whole images. Without pictures (`keep=False`) `stored` is empty.
    """

    layer: str
    units: Int[Tensor, " units"]
    image_ids: Int[Tensor, "units k"]
    values: Float[Tensor, "units k"]
    maps: Float[Tensor, "units k h w"]
    threshold: Float[Tensor, " units"]
    threshold_error: Float[Tensor, " units"]
    quantile: float
    seen: int
    size: tuple[int, int]
    flat: bool
    stored_ids: Int[Tensor, " pictures"]
    stored: UInt8[Tensor, "pictures channels height width"]

    def __len__(self) -> int:
        return len(self.units)

    @property
    def dead(self) -> Bool[Tensor, " units"]:
        """Units that never exceed their own threshold (silent or constant ones): they have no regions."""
        return self.values[:, 0] <= self.threshold

    def take(self, rows: Sequence[int] | Tensor) -> ExemplarSet:
        """The same of some rows (places in `units`)."""
        rows = torch.as_tensor(rows)
        each = ("units", "image_ids", "values", "maps", "threshold", "threshold_error")
        return replace(self, **{name: getattr(self, name)[rows] for name in each})

    def masks(self, size: tuple[int, int] | None = None) -> Bool[Tensor, "units k 1 height width"]:
        """The region of each exemplar, as large as the images unless told (the paper: 224 x 224)."""
        units, k = self.image_ids.shape
        rows = torch.arange(units).repeat_interleave(k)
        return self.masks_of(rows, torch.arange(k).repeat(units), size).unflatten(0, (units, k))

    def masks_of(
        self, rows: Int[Tensor, " n"], ranks: Int[Tensor, " n"], size: tuple[int, int] | None = None
    ) -> Bool[Tensor, "n 1 height width"]:
        """The regions of some exemplars: places in `units`, and which of that unit's."""
        high, wide = size or self.size
        if self.flat:
            return torch.ones(len(rows), 1, high, wide, dtype=torch.bool)
        maps = self.maps[rows, ranks][:, None]
        if maps.shape[2:] != (high, wide):
            maps = interpolate(maps, (high, wide), mode="bilinear", align_corners=False)
        return maps > self.threshold[rows][:, None, None, None]

    @property
    def places(self) -> Int[Tensor, "units k"]:
        """Where in `stored` the exemplars' images are."""
        if not len(self.stored):
            raise ValueError("these exemplars hold no pictures; call exemplars(..., keep=True)")
        return torch.searchsorted(self.stored_ids, self.image_ids)

    def pictures(self) -> UInt8[Tensor, "units k channels height width"]:
        """The exemplars' images as bytes."""
        return self.stored[self.places]

    def batches(self, rows: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and masks of so many units at a time: all at once they can be large."""
        for part in torch.arange(len(self)).split(rows):
            some = self.take(part)
            pictures = some.pictures()
            high, wide = pictures.shape[-2:]
            yield pictures, some.masks((high, wide))

    def grid(self, row: int, columns: int = 5) -> UInt8[Tensor, "3 height width"]:
        """One unit's exemplars as one picture, dimmed to a quarter outside the regions."""
        some = self.take([row])
        picture = some.pictures()[0]
        high, wide = picture.shape[-2:]
        light = torch.where(some.masks((high, wide))[0], 1.0, DIMMED)
        shown = (picture * light).to(torch.uint8).expand(-1, 3, -1, -1)
        missing = -len(shown) % columns
        shown = torch.cat([shown, shown.new_zeros(missing, *shown.shape[1:])])
        return shown.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).reshape(3, -1, columns * shown.shape[-1])

    def compact(self, side: int = 14) -> dict[str, Tensor]:
        """A unit in few bytes: its images, how high they peak, its threshold, and each region on a small grid.

        `masks` are bytes `[units, k, side, side]`: 255 times the share of the cell that lies in the region, at
        least 1 where any does.
        """
        shares = []
        for part in torch.arange(len(self)).split(16):
            inside = self.take(part).masks()[:, :, 0].float()
            share = (255 * adaptive_avg_pool2d(inside, side)).ceil()
            shares.append(share.to(torch.uint8))
        return {
            "unit": self.units, "image_ids": self.image_ids, "values": self.values, "threshold": self.threshold,
            "dead": self.dead, "masks": torch.cat(shares),
        }  # fmt: skip

    def save(self, path: str | Path) -> Path:
        """Into a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        about = {name: str(value) for name, value in tensors.items() if not isinstance(value, Tensor | tuple)}
        about["size"] = "x".join(map(str, self.size))
        path = Path(path)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        save_file({n: t.contiguous() for n, t in tensors.items() if isinstance(t, Tensor)}, new, metadata=about)
        return new.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> ExemplarSet:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about: dict[str, str] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            high, wide = about["size"].split("x")
            return cls(
                layer=about["layer"], quantile=float(about["quantile"]), seen=int(about["seen"]),
                size=(int(high), int(wide)), flat=about["flat"] == "True", **tensors,
            )  # fmt: skip
        except (SafetensorError, KeyError, TypeError) as error:
            raise ModelError(f"{path} holds no exemplars ({error}); write them with ExemplarSet.save") from error


def exemplars(
    model: nn.Module,
    images: Any,
    layer: str | Site,
    *,
    k: int = K,
    quantile: float = QUANTILE,
    units: Sequence[int] | None = None,
    batch_size: int = 32,
    show: Callable[[Tensor], Tensor] | None = None,
    reshape: Reshape | None = None,
    generative: bool = False,
    keep: bool = True,
    checkpoint: str | Path | None = None,
    save_every: int = 50,
    capacity: int = CAPACITY,
    bins: int = BINS,
) -> ExemplarSet:
    """The exemplars of the units of one layer.

    images      a tensor `[n, ...]`, a data set, or an iterable of batches (of pairs, the first is taken)
    layer       the name of a module, or a Site (its activation, after the nonlinearity). Maps `[batch, units, h, w]`,
                tokens (a ViT's CLS is dropped), fully connected units; anything else needs `reshape`
    units       some of them; all by default
    show        from a batch of images, as the model takes them, to pictures in 0..1 (undo the normalisation)
    generative  `images` are latent codes (all of a pair are given to the model) and the pictures its outputs
    keep        keep the pictures; without, only regions and the places of the images in the probe
    checkpoint  a file that is written every `save_every` batches and from which a run that was stopped goes on, to
                the same result; it is deleted at the end
    capacity, bins  of the quantile's sketch, see `RunningQuantile`

    The model runs in evaluation mode, without gradients, on the device it is on, and is as it was afterwards. Raises
    UnknownLayer with near names, ModelError for a layer whose output is none of these, ValueError for settings out of
    range, an empty probe or pictures outside 0..1.
    """
    _check(model, layer, k, quantile, units)
    settings = {"k": k, "quantile": quantile, "capacity": capacity, "bins": bins, "keep": keep}
    run = _Run(layer, reshape, settings, units)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load_state_dict(torch.load(path, weights_only=True), path)
    with _still(model), seen_layer(model, layer) as seen:
        for number, batch in enumerate(batched(images, batch_size, run.top.seen), 1):
            inputs = inputs_of(model, batch, generative)
            out = model(*inputs)
            source = (out[0] if isinstance(out, tuple) else out) if generative else inputs[0]
            run.add(seen, source, show)
            if path is not None and number % save_every == 0:
                _write(run.state_dict(), path)
    found = run.result()
    if path is not None:
        path.unlink(missing_ok=True)
    return found


def regions(
    model: nn.Module, images: Any, layers: Sequence[str | Site], *, k: int = K, quantile: float = QUANTILE
) -> list[ExemplarSet]:
    """`exemplars` of several layers in one pass over the images, without pictures.

    What is kept of each layer (`k` maps and a sketch a unit) is kept of all of them at once.
    """
    for layer in layers:
        _check(model, layer, k, quantile, None)
    settings = {"k": k, "quantile": quantile, "capacity": CAPACITY, "bins": BINS, "keep": False}
    runs = [_Run(layer, None, settings, None) for layer in layers]
    with _still(model), ExitStack() as stack:
        seen = [stack.enter_context(seen_layer(model, layer)) for layer in layers]
        for batch in batched(images, 32):
            inputs = inputs_of(model, batch)
            model(*inputs)
            for run, maps in zip(runs, seen, strict=True):
                run.add(maps, inputs[0], None)
    return [run.result() for run in runs]


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _check(model: nn.Module, layer: str | Site, k: int, quantile: float, units: Sequence[int] | None) -> None:
    check_layer(model, layer)
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 exemplar a unit or more")
    if not 0 < quantile < 1:
        raise ValueError(f"quantile is {quantile}; expected a number between 0 and 1, such as 0.99")
    if units is not None and not len(units):
        raise ValueError("units is empty; name one, or leave it out for all")


def batched(images: Any, batch_size: int, skip: int = 0) -> Iterator[Any]:
    """The probe from an image on: slices of tensors, items of a data set put together, or the batches that come."""
    if isinstance(images, torch.utils.data.TensorDataset):
        images = images.tensors
    if isinstance(images, Tensor):
        yield from images[skip:].split(batch_size) if skip < len(images) else ()
    elif isinstance(images, tuple) and all(isinstance(part, Tensor) for part in images):
        yield from zip(*(batched(part, batch_size, skip) for part in images), strict=True)
    elif hasattr(images, "__getitem__") and hasattr(images, "__len__") and not isinstance(images, list | tuple):
        for start in range(skip, len(images), batch_size):
            items = [images[i] for i in range(start, min(start + batch_size, len(images)))]
            yield torch.utils.data.default_collate(items)
    elif isinstance(images, Iterable):
        yield from _after(images, skip)
    else:
        kind = type(images).__name__
        raise ValueError(f"images is a {kind}; expected a tensor, a data set or an iterable of batches")


def _after(batches: Iterable[Any], skip: int) -> Iterator[Any]:
    """The batches after so many images, which end with a batch."""
    for batch in batches:
        size = len(batch if isinstance(batch, Tensor) else next(iter(batch)))
        if skip >= size:
            skip -= size
        elif skip:
            raise ValueError("the checkpoint ends within a batch: go on with batches of the size it was made with")
        else:
            yield batch


def inputs_of(model: nn.Module, batch: Any, generative: bool = False) -> list[Tensor]:
    """What the model is given of a batch: the first of a pair, or all of it."""
    parts = [batch] if isinstance(batch, Tensor) else list(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return [part.to(device) for part in (parts if generative else parts[:1])]


class _Run:
    """Exemplars of one layer in the making; all of its state can be written down."""

    def __init__(
        self, layer: str | Site, reshape: Reshape | None, settings: dict[str, Any], units: Sequence[int] | None
    ) -> None:
        self.name = layer.name if isinstance(layer, Site) else layer
        self._last = isinstance(layer, Site) and layer.tap.axis == -1
        self._reshape, self.settings = reshape, settings
        self.top = RunningTopK(settings["k"])
        self.units = None if units is None else torch.as_tensor(units)
        self.sketch: RunningQuantile | None = None
        self.flat = False
        self.size: tuple[int, int] = (1, 1)
        self.pictures: dict[int, Tensor] = {}

    def _sketch(self) -> RunningQuantile:
        assert self.units is not None
        return RunningQuantile(len(self.units), self.settings["capacity"], self.settings["bins"])

    def add(self, seen: list[Any], images: Tensor, show: Callable[[Tensor], Tensor] | None) -> None:
        """Take in what the layer gave for a batch of images; the list is emptied for the next."""
        if len(seen) != 1:
            raise ModelError(f"layer {self.name!r} ran {len(seen)} times in one forward pass; expected once")
        maps, flat = as_maps(seen.pop(), len(images), self._last, self._reshape, self.name)
        maps = maps.cpu()
        if self.units is None:
            self.units = torch.arange(maps.shape[1])
        if self.sketch is None:
            width = maps.shape[1]
            if not 0 <= int(self.units.min()) <= int(self.units.max()) < width:
                raise ValueError(f"units {self.units.tolist()}: layer {self.name!r} has units 0 to {width - 1}")
            self.sketch, self.flat = self._sketch(), flat
        maps = maps[:, self.units]
        if self.top.seen and maps.shape[2:] != self.top.maps.shape[2:]:
            raise ValueError(
                f"maps of {list(maps.shape[2:])} after maps of {list(self.top.maps.shape[2:])}: "
                "bring the images to one size first"
            )
        first, images = self.top.seen, images.detach()
        self.sketch.add(maps.transpose(0, 1).flatten(1))
        self.top.add(maps)
        spatial = images.dim() == 4
        self.size = (images.shape[2], images.shape[3]) if spatial else (maps.shape[2], maps.shape[3])
        if self.settings["keep"]:
            self._keep(images, show, first)

    def _keep(self, images: Tensor, show: Callable[[Tensor], Tensor] | None, first: int) -> None:
        wanted = set(self.top.ids.unique().tolist())
        self.pictures = {place: held for place, held in self.pictures.items() if place in wanted}
        new = sorted(place for place in wanted if place >= first)
        if not new:
            return
        chosen = images[torch.tensor(new) - first]
        shown = (chosen if show is None else show(chosen)).float().cpu()
        if shown.dim() != 4 or shown.amin() < -1e-3 or shown.amax() > 1 + 1e-3:
            raise ValueError(
                f"pictures {list(shown.shape)} run from {shown.amin():.3g} to {shown.amax():.3g}; expected "
                "[n, channels, height, width] in 0..1. Give show=, which undoes the normalisation, or keep=False"
            )
        self.pictures.update(zip(new, (shown.clamp(0, 1) * 255).round().to(torch.uint8), strict=True))

    def _stored(self) -> tuple[Tensor, Tensor]:
        places = sorted(self.pictures)
        held = [self.pictures[place] for place in places]
        return torch.tensor(places, dtype=torch.int64), torch.stack(held) if held else torch.zeros(
            0, 3, 1, 1, dtype=torch.uint8
        )

    def result(self) -> ExemplarSet:
        if self.sketch is None or self.units is None:
            raise ValueError("the probe is empty; give at least one image")
        stored_ids, stored = self._stored()
        quantile = self.settings["quantile"]
        return ExemplarSet(
            self.name, self.units, self.top.ids, self.top.values, self.top.maps, self.sketch.quantile(quantile),
            self.sketch.error(quantile), quantile, self.top.seen, self.size, self.flat, stored_ids, stored,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        assert self.sketch is not None
        stored_ids, stored = self._stored()
        return {
            "settings": self.settings, "layer": self.name, "top": self.top.state_dict(),
            "sketch": self.sketch.state_dict(), "units": self.units, "flat": self.flat, "size": self.size,
            "stored_ids": stored_ids, "stored": stored,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        given = self.units
        same = state["settings"] == self.settings and state["layer"] == self.name
        if not same or (given is not None and not torch.equal(given, state["units"])):
            raise ValueError(
                f"{path} is of a run of {state['layer']!r} with other settings ({state['settings']}); delete it or use "
                "its own"
            )
        self.units, self.flat, self.size = state["units"], state["flat"], tuple(state["size"])
        self.top.load_state_dict(state["top"])
        self.sketch = self._sketch()
        self.sketch.load_state_dict(state["sketch"])
        self.pictures = dict(zip(state["stored_ids"].tolist(), state["stored"], strict=True))


def _write(state: dict[str, Any], path: Path) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    torch.save(state, new)
    new.replace(path)
