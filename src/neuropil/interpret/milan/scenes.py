"""Generated scenes, whose every region is known: synthetic pictures to learn describing from, and to test it on.

Each has two objects (colour x texture x shape x size), one above, below, left or right of the other, on a grey
and uneven ground, and sometimes letters in a corner. They stand in for the paper's 60,000 descriptions that people
wrote of regions of photographs, which do not travel inside a package; a captioner trained on them knows these words
and no others.

>>> made = scenes(4, seed=0)
>>> made.images.shape, made.regions.shape, made.objects.shape
(torch.Size([4, 3, 64, 64]), torch.Size([4, 3, 64, 64]), torch.Size([4, 2, 4]))
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from neuropil.interpret.milan.exemplars import ExemplarSet
from neuropil.interpret.milan.grammar import ATTRIBUTES, COLOURS, KINDS, RELATIONS, SHAPES, SIZES, TEXT, TEXTURES, say

SIDE, PERIOD = 64, 6
RGB = torch.tensor(
    [
        (0.9, 0.1, 0.1),
        (0.1, 0.7, 0.2),
        (0.15, 0.3, 0.95),
        (0.95, 0.85, 0.1),
        (0.6, 0.15, 0.75),
        (1, 0.5, 0.05),
        (1, 1, 1),
    ]
)
SHARED = 0.8  # of a unit's regions have an attribute that counts as its own
MENTIONED = 0.75  # chance that an annotator names an attribute


@dataclass(frozen=True)
class Scenes:
    """Pictures in 0..1; regions of the first object, the second, and the letters (empty where there are none).

    `objects` holds the places of colour, texture, shape and size in `grammar.KINDS`, `relation` that of the first
    object to the second in `grammar.RELATIONS`.
    """

    images: Float[Tensor, "n 3 side side"]
    regions: Bool[Tensor, "n 3 side side"]
    objects: Int[Tensor, "n 2 4"]
    relation: Int[Tensor, " n"]
    text: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def has(self) -> Bool[Tensor, "n 3 attributes"]:
        """Which attributes (`grammar.ATTRIBUTES`) each region has."""
        out = torch.zeros(len(self), 3, len(ATTRIBUTES), dtype=torch.bool)
        start = 0
        for kind, names in enumerate(KINDS):
            out[:, :2, start : start + len(names)] = torch.nn.functional.one_hot(
                self.objects[:, :, kind], len(names)
            ).bool()
            start += len(names)
        out[:, 2, -1] = self.text
        return out

    def concepts(self, side: int) -> Bool[Tensor, "attributes n side side"]:
        """Where each attribute is, on a grid (NetDissect's labelled concepts)."""
        share = avg_pool2d(self.regions.float(), SIDE // side)
        return torch.einsum("nrhw,nra->anhw", (share >= 0.5).float(), self.has.float()) > 0


def scenes(count: int, seed: int = 0) -> Scenes:
    """So many scenes; one seed gives the same ones."""
    g = torch.Generator().manual_seed(seed)
    objects = torch.stack([torch.randint(len(kind), (count, 2), generator=g) for kind in KINDS], 2)
    relation = torch.randint(4, (count,), generator=g)
    text = torch.rand(count, generator=g) < 0.35
    images = _ground(count, g)
    centres = _centres(relation, g)
    radius = torch.where(objects[:, :, 3] == 0, 7.0, 12.0) + 2 * torch.rand(count, 2, generator=g)
    regions = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.bool)
    for which in (0, 1):
        inside = _inside(objects[:, which, 2], centres[:, which], radius[:, which])
        colour = RGB[objects[:, which, 0]] + 0.04 * torch.randn(count, 3, generator=g)
        light = _texture(objects[:, which, 1], g)
        painted = (colour[:, :, None, None] * light[:, None]).clamp(0, 1)
        images = torch.where(inside[:, None], painted, images)
        regions[:, which] = inside
    regions[:, 0] &= ~regions[:, 1]
    _print(images, regions, text, random.Random(seed))
    images = (images + 0.02 * torch.randn(images.shape, generator=g)).clamp(0, 1)
    return Scenes(images, regions, objects, relation, text)


def _ground(count: int, g: torch.Generator) -> Tensor:
    """Grey, from black to light, with slow and fast unevenness."""
    level = 0.7 * torch.rand(count, 1, 1, 1, generator=g)
    slow = interpolate(torch.randn(count, 1, 5, 5, generator=g), (SIDE, SIDE), mode="bicubic", align_corners=False)
    uneven = 0.25 * torch.rand(count, 1, 1, 1, generator=g)
    return (level + uneven * slow).clamp(0, 0.85).expand(-1, 3, -1, -1)


def _centres(relation: Tensor, g: torch.Generator) -> Tensor:
    """Row and column of the two objects."""
    off = torch.tensor([[-14.0, 0.0], [14.0, 0.0], [0.0, -14.0], [0.0, 14.0]])[relation]
    jitter = 3 * torch.rand(len(relation), 2, 2, generator=g) - 1.5
    return SIDE / 2 + torch.stack([off, -off], 1) + jitter


def _inside(shape: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    place = torch.arange(SIDE) + 0.5
    y = (place[None, :, None] - centre[:, 0, None, None]) / radius[:, None, None]
    x = (place[None, None, :] - centre[:, 1, None, None]) / radius[:, None, None]
    y, x = torch.broadcast_tensors(y, x)
    within = (x.abs() <= 0.88) & (y.abs() <= 0.88)
    every = [
        x**2 + y**2 <= 1,
        within,
        (y <= 0.8) & (y >= -1) & (x.abs() <= 0.55 * (y + 1)),
        within & ((x.abs() <= 0.3) | (y.abs() <= 0.3)),
    ]
    return torch.stack(every, 1)[torch.arange(len(shape)), shape]


def _texture(kind: Tensor, g: torch.Generator) -> Tensor:
    """Light of plain, striped (across), dotted and checkered surfaces, at random phases."""
    phase = PERIOD * torch.rand(2, len(kind), 1, 1, generator=g)
    place = torch.arange(SIDE)
    y = (place[None, :, None] + phase[0]).remainder(PERIOD) - PERIOD / 2
    x = (place[None, None, :] + phase[1]).remainder(PERIOD) - PERIOD / 2
    y, x = torch.broadcast_tensors(y, x)
    every = [torch.ones_like(y, dtype=torch.bool), y > 0, x**2 + y**2 < 4.5, (y > 0) ^ (x > 0)]
    bright = torch.stack(every, 1)[torch.arange(len(kind)), kind]
    return torch.where(bright, 1.0, 0.2)


def glyph(text: str, size: int = 12) -> Bool[Tensor, "height width"]:
    """Letters as a small picture."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    left, top, right, bottom = (round(v) for v in font.getbbox(text))
    sheet = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(sheet).text((1 - left, 1 - top), text, fill=255, font=font)
    return torch.from_numpy(np.array(sheet) > 100)


def _print(images: Tensor, regions: Tensor, text: Tensor, draw: random.Random) -> None:
    """Two or three letters into a corner of the scenes that have text, light on dark or dark on light."""
    signs = "ABCDEFGHKLMNPRSTUXYZ0123456789"
    for row in text.nonzero().flatten().tolist():
        ink = glyph("".join(draw.choices(signs, k=draw.choice((2, 2, 3)))), draw.choice((11, 12, 13, 14)))
        high, wide = ink.shape
        y = draw.choice((draw.randrange(4), SIDE - high - draw.randrange(4)))
        x = draw.choice((draw.randrange(4), SIDE - wide - draw.randrange(4)))
        box = (slice(y, y + high), slice(x, x + wide))
        dark = float(images[row][:, box[0], box[1]].mean()) < 0.5
        patch = images[row][:, box[0], box[1]]
        images[row][:, box[0], box[1]] = torch.where(ink, 0.95 if dark else 0.05, patch)
        regions[row, :2, box[0], box[1]] = False
        regions[row, 2, box[0], box[1]] = True


@dataclass(frozen=True)
class Annotations:
    """Sets of regions, as the exemplars of a unit would be, and what three annotators say of each set."""

    scene: Int[Tensor, "sets k"]
    region: Int[Tensor, "sets k"]
    concepts: list[set[str]]
    sentences: list[list[str]]


def annotate(made: Scenes, count: int, seed: int = 0, k: int = 15, people: int = 3) -> Annotations:
    """So many sets of regions that share a concept, most of them; up to a fifth of each set are strays.

    A concept is one to three attributes of an object, these beside a relation, letters, or nothing at all. An
    annotator names each attribute with a chance of 0.75, so that people differ in how specific they are.
    """
    draw = random.Random(seed)
    has = made.has.flatten(0, 1)
    relation = torch.stack([made.relation, made.relation ^ 1, torch.full_like(made.relation, -1)], 1).flatten()
    real = made.regions.flatten(2).any(2).flatten()
    everywhere = real.nonzero().flatten().tolist()
    sets: list[list[int]] = []
    concepts: list[set[str]] = []
    said: list[list[str]] = []
    while len(sets) < count:
        concept = _concept(draw)
        fits = real & has[:, [ATTRIBUTES.index(a) for a in concept if a in ATTRIBUTES]].all(1)
        for name in concept & set(RELATIONS):
            fits = fits & (relation == RELATIONS.index(name))
        members = fits.nonzero().flatten().tolist()
        if len(members) < k:
            continue
        strays = draw.choice((0, 0, 1, 2, 3))
        chosen = draw.sample(members, k - strays) + draw.choices(everywhere, k=strays)
        sets.append(chosen)
        concepts.append(concept)
        said.append([say(_noticed(concept, draw), draw) for _ in range(people)])
    flat = torch.tensor(sets)
    return Annotations(flat // 3, flat % 3, concepts, said)


def _concept(draw: random.Random) -> set[str]:
    kind = draw.random()
    if kind < 0.1:
        return {TEXT}
    if kind < 0.17:
        return set()
    parts = draw.sample((COLOURS, TEXTURES, SHAPES, SIZES), draw.choice((1, 2, 2, 3)))
    concept = {draw.choice(part) for part in parts}
    return concept | {draw.choice(RELATIONS)} if kind > 0.92 else concept


def _noticed(concept: set[str], draw: random.Random) -> set[str]:
    """What one annotator names: never less than one thing where there is any."""
    named = {a for a in sorted(concept) if draw.random() < MENTIONED}
    return named or ({draw.choice(sorted(concept))} if concept else set())


def worn(regions: Bool[Tensor, "n r side side"], seed: int = 0) -> Float[Tensor, "n r side side"]:
    """Regions as units mark them: grown, shrunk or blurred over the edge; what would vanish stays as it is."""
    g = torch.Generator().manual_seed(seed)
    soft = avg_pool2d(regions.float(), 7, 1, 3)
    level = torch.tensor([0.15, 0.5, 0.8])[torch.randint(3, regions.shape[:2], generator=g)]
    out = soft > level[:, :, None, None]
    lost = ~out.flatten(2).any(2)
    return torch.where(lost[:, :, None, None], regions, out).float()


def shared(found: ExemplarSet, made: Scenes) -> list[set[str]]:
    """The attributes that four fifths of a unit's regions have: the truth about it, from the scenes themselves.

    A region is of the object, or letters, that covers most of it, if that is a tenth or more.
    """
    out = []
    for row in range(len(found)):
        some = found.take([row])
        masks = some.masks((SIDE, SIDE))[0, :, 0].float()
        ids = some.image_ids[0]
        cover = torch.einsum("khw,krhw->kr", masks, made.regions[ids].float())
        share = cover / masks.sum((1, 2)).clamp_min(1)[:, None]
        best = share.argmax(1)
        has = made.has[ids, best] & (share.amax(1) >= 0.1)[:, None]
        rate = has.float().mean(0)
        out.append({ATTRIBUTES[a] for a in (rate >= SHARED).nonzero().flatten().tolist()})
    return out


def subset(made: Scenes, rows: Sequence[int] | Tensor) -> Scenes:
    rows = torch.as_tensor(rows)
    return Scenes(made.images[rows], made.regions[rows], made.objects[rows], made.relation[rows], made.text[rows])
