"""Networks for the generated scenes: a classifier to encode with, one with planted units, and a ready captioner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d

from neuropil.interpret.milan.encoder import RegionEncoder
from neuropil.interpret.milan.estimator import MILAN
from neuropil.interpret.milan.grammar import ATTRIBUTES, COLOURS
from neuropil.interpret.milan.scenes import PERIOD, RGB, SIDE, Scenes, annotate, scenes, worn
from neuropil.training import fit, supervised

WIDTHS = (8, 16, 32, 64, 64)
LEVELS = ("level0", "level1", "level2", "level3", "level4")
MEAN, STD = (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)


class SceneNet(nn.Sequential):
    """Five levels of convolution, norm and rectifier, halved from the second on; which attributes a scene shows."""

    def __init__(self, widths: Sequence[int] = WIDTHS, out: int = len(ATTRIBUTES)) -> None:
        super().__init__()
        before = 3
        for level, width in enumerate(widths):
            parts = [
                nn.Conv2d(before, width, 3, 1 if level == 0 else 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            ]  # fmt: skip
            self.add_module(f"level{level}", nn.Sequential(*parts))
            before = width
        self.add_module("pool", nn.AdaptiveMaxPool2d(1))
        self.add_module("flat", nn.Flatten())
        self.add_module("head", nn.Linear(before, out))


def normalised(pictures: Tensor) -> Tensor:
    """Pictures in 0..1 as `SceneNet` takes them."""
    return (pictures - MEAN[0]) / STD[0]


def trained_net(made: Scenes, seed: int = 0, widths: Sequence[int] = WIDTHS, epochs: int = 6) -> SceneNet:
    """A net that tells which attributes occur in a scene."""
    torch.manual_seed(seed)
    net = SceneNet(widths)
    steps = epochs * -(-len(made) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    data = (normalised(made.images), made.has.any(1).float())
    loss = supervised(nn.functional.binary_cross_entropy_with_logits)
    fit(net, data, loss, optimizer, scheduler=schedule, epochs=epochs, batch_size=64, seed=seed, progress=False)
    return net.eval()


def encoder_of(net: nn.Module, levels: Sequence[str] = LEVELS) -> RegionEncoder:
    """The pyramid encoder around a scene net; other pictures are brought to its size."""
    return RegionEncoder(net, levels, MEAN, STD, size=SIDE)


class Planted(nn.Module):
    """Units whose meaning is known, for scenes in 0..1: each colour; each colour where plain; where striped.

    The response is built by hand: closeness to the colour; its mean over a patch above what a patterned surface can
    reach; the swing of that closeness down a patch at the period of the stripes, less that along it.
    """

    meanings: tuple[frozenset[str], ...] = (
        *(frozenset({c}) for c in COLOURS),
        *(frozenset({c, "plain"}) for c in COLOURS),
        *(frozenset({c, "striped"}) for c in COLOURS),
    )

    wave: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Identity()
        turn = 2 * torch.pi * torch.arange(2 * PERIOD) / PERIOD
        wave = torch.stack([turn.cos(), turn.sin()])[:, None, :, None].expand(-1, -1, -1, 2 * PERIOD)
        self.register_buffer("wave", wave / (2 * PERIOD) ** 2)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n units h2 w2"]:
        far = (x[:, None] - RGB[None, :, :, None, None]).norm(dim=2)
        near = (1 - far / 0.35).relu()  # [n, colours, h, w]
        flat = near.flatten(0, 1)[:, None]
        down, along = (
            conv2d(flat, w, padding=PERIOD)[:, :, :-1, :-1].norm(dim=1).unflatten(0, near.shape[:2])
            for w in (self.wave, self.wave.transpose(2, 3))
        )
        plain = (avg_pool2d(near, 9, 1, 4) - 0.6).relu()
        striped = (down - 2 * along - 0.05).relu()
        whole = avg_pool2d(near, 5, 1, 2)
        return self.units(avg_pool2d(torch.cat([whole, plain, striped], 1), 4))


def annotated(
    encoder: RegionEncoder, made: Scenes, count: int, seed: int = 0, k: int = 15
) -> tuple[Float[Tensor, "sets k features"], list[list[str]]]:
    """Vectors of annotated sets of regions, and their sentences: what `MILAN.fit` takes."""
    masks = worn(made.regions, seed)
    parts = zip(made.images.split(64), masks.split(64), strict=True)
    vectors = [encoder.regions(images, some) for images, some in parts]
    said = annotate(made, count, seed, k)
    return torch.cat(vectors)[said.scene, said.region], said.sentences


def scene_captioner(
    folder: str | Path | None = None,
    seed: int = 0,
    *,
    count: int = 2500,
    sets: int = 2000,
    epochs: int = 6,
    captioner_epochs: int = 40,
) -> MILAN:
    """A captioner of generated scenes: trained in a minute or two the first time, then kept in `folder` (the cache's).

    It knows some sixty words: colours, textures, shapes, sizes, places and letters. Of photographs it says which of
    these they remind it of; for more, train `MILAN` on your own regions and sentences. The sizes are those of its
    training: scenes, annotated sets, epochs of its encoder, and of captioner and language model at most.
    """
    from safetensors.torch import load_file, save_file

    from neuropil.models.assets import cache_dir

    folder = Path(folder) if folder is not None else cache_dir() / f"milan-scenes-{seed}"
    net = SceneNet()
    if (folder / "milan.json").exists() and (folder / "encoder.safetensors").exists():
        net.load_state_dict(load_file(folder / "encoder.safetensors"))
        return MILAN.load(folder, encoder_of(net.eval()))
    made = scenes(count, seed)
    net = trained_net(made, seed, epochs=epochs)
    keys, said = annotated(encoder_of(net), made, sets, seed)
    milan = MILAN(
        encoder_of(net),
        hidden=128,
        lr=5e-3,
        batch_size=32,
        standardise=True,
        epochs=captioner_epochs,
        lm_epochs=captioner_epochs,
        random_state=seed,
    ).fit(keys, said)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(net.state_dict()), folder / "encoder.safetensors")
    milan.save(folder)
    return milan
