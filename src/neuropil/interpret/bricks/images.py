"""Classes of images, as functions of a vision model: half of each class is learned from, the other half tests.

What pruning costs is the rise of -log p(c) in nats, c the image's own class where the model has as many classes as the
probe, else the class that the whole model prefers: the convention of an atlas's ablations (`neuropil.ablation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from neuropil.ablation import logits
from neuropil.errors import ModelError
from neuropil.evaluate import evaluating, surprise
from neuropil.neurons import capture, find_sites
from neuropil.vision import prepared

if TYPE_CHECKING:
    from neuropil.data import Probe
    from neuropil.interpret.bricks.activity import Example
    from neuropil.models import ImageInput, Model

BATCH = 8
LEAST = 4  # images of a class: two to learn from, two to test on
OWN, PREFERRED = "its own class", "the class that the whole model prefers"


@dataclass(frozen=True)
class Batches:
    """Images as the model takes them, eight at a time, as often as asked for: only their bytes are held."""

    pixels: UInt8[Tensor, "n c h w"]
    takes: ImageInput

    def __iter__(self) -> Iterator[Tensor]:
        return (self.takes(part) for part in self.pixels.split(BATCH))


@dataclass(frozen=True)
class ImageFunctions:
    """Classes of images as the functions of a model; `image_functions` makes them.

    train    by class, batches to learn from: for `functionality`
    mixed    all those images, one of each class in turn: for the methods of `partition_bricks` that need data
    test     by class, its other half, and the class whose probability is measured: for `pruning_matrix`, with `loss`
    target   whether that is each image's own class or the one that the model prefers, in words
    layers   numbers of the sites that images pass, and in `left` why others are left out
    """

    takes: ImageInput
    train: dict[str, Batches]
    mixed: Batches
    test: dict[str, list[Example]]
    target: str
    layers: list[int]
    left: dict[str, str]

    def loss(self, model: nn.Module, example: Example) -> Float[Tensor, ""]:
        """Mean surprise (nats) of the wanted class of each image; `example` is (pixels, classes)."""
        assert isinstance(example, tuple)
        pixels, wanted = example
        return surprise(_scores(model, Batches(pixels, self.takes)), wanted).mean()


@torch.no_grad()
def image_functions(model: Model, images: Probe, names: Sequence[str] | None = None) -> ImageFunctions:
    """The classes of `images` (those of `names` alone, if given) as functions of `model`.

    Raises ModelError for images without classes or a model that gives no scores of classes, ValueError for an unknown
    class, fewer than two, one of fewer than four images, or one with a slash in its name (`functionality` reads it as a
    sub-function).

    >>> from neuropil.data import probe
    >>> from neuropil.interpret.bricks import functionality, neurons_of, pruning_matrix
    >>> from neuropil.models import load
    >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> shown = image_functions(load(net), probe("digits", 1, (8, 8), limit=240), ["0", "1", "2"])
    >>> [len(each.pixels) for each in shown.train.values()], shown.target
    ([12, 12, 12], 'its own class')
    >>> found = functionality(net, shown.train)
    >>> sets = {name: neurons_of(found, name, 0.25) for name in shown.test}
    >>> pruning_matrix(net, sets, shown.test, loss=shown.loss).increase.shape
    torch.Size([3, 3])
    """
    names = list(images.classes if names is None else names)
    places = _places(images, names)
    takes, net = prepared(model, images), model.module()
    halves = {name: images.part(chosen).halves() for name, chosen in places.items()}
    train = {name: Batches(one.pixels, takes) for name, (one, _) in halves.items()}
    sites = find_sites(net)
    with evaluating(net), capture(net, sites) as seen:
        classes = _scores(net, Batches(images.pixels[:1], takes)).shape[1]
        passed = [site.name in seen for site in sites]
    own = classes == len(images.classes)
    test: dict[str, list[Example]] = {}
    with evaluating(net):
        for name, (_, other) in halves.items():
            wanted = other.labels if own else _scores(net, Batches(other.pixels, takes)).argmax(1)
            test[name] = [(other.pixels, wanted)]
    turns = [
        each.pixels[i] for i in range(max(map(len, places.values()))) for each, _ in halves.values() if i < len(each)
    ]
    return ImageFunctions(
        takes,
        train,
        Batches(torch.stack(turns), takes),
        test,
        OWN if own else PREFERRED,
        [number for number, ran in enumerate(passed) if ran],
        {site.name: "no image passes it" for site, ran in zip(sites, passed, strict=True) if not ran},
    )


def _scores(model: nn.Module, batches: Batches) -> Float[Tensor, "n classes"]:
    return torch.cat([logits(model(x)) for x in batches])


def _places(images: Probe, names: Sequence[str]) -> dict[str, list[int]]:
    """Where the images of each class are."""
    if images.labels is None:
        raise ModelError(
            f"the images {images.name!r} have no classes, which are the functions of a vision model; give others with "
            "--images: fashion-mnist, digits, or a folder with a subfolder for each class"
        )
    if unknown := [name for name in names if name not in images.classes]:
        raise ValueError(f"{unknown[0]!r} is no class of {images.name!r}; there are {', '.join(images.classes)}")
    if len(names) < 2:
        raise ValueError(f"{images.name!r}: got {len(names)} class; give two or more, each is told from the others")
    if parted := [name for name in names if "/" in name]:
        raise ValueError(f"class {parted[0]!r}: a name with a slash is that of a sub-function; give it another")
    places = {name: torch.nonzero(images.labels == images.classes.index(name))[:, 0].tolist() for name in names}
    if few := [name for name, chosen in places.items() if len(chosen) < LEAST]:
        count = len(places[few[0]])
        raise ValueError(
            f"class {few[0]!r} of {images.name!r} has {count} image{'' if count == 1 else 's'}; give {LEAST} or more "
            "(half are learned from, half test), or name other classes alone"
        )
    return places
