"""What a captioner sees of a region: features of a frozen classifier, averaged over the region at every level.

    v = concat_l  sum_xy m_l f_l / sum_xy m_l        m_l: the mask, bilinearly brought to the size of f_l

>>> net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU())
>>> encoder = RegionEncoder(net, ["1", "3"])
>>> encoder(torch.rand(5, 3, 16, 16), torch.ones(5, 1, 16, 16)).shape
torch.Size([5, 12])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import interpolate

from neuropil.interpret.milan.exemplars import ExemplarSet
from neuropil.interpret.milan.layer import check_layer

PICTURES = 32  # that go through the network at once
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pool(maps: Float[Tensor, "n c h w"], masks: Float[Tensor, "n 1 height width"]) -> Float[Tensor, "n c"]:
    """The mean of each map over its region, however large the mask's numbers; zero where the mask is empty."""
    m = interpolate(masks, maps.shape[2:], mode="bilinear", align_corners=False)
    total = m.sum((2, 3))
    share = m / torch.where(total == 0, 1.0, total)[:, :, None, None]
    return torch.einsum("nchw,nhw->nc", maps, share[:, 0])


class RegionEncoder(nn.Module):
    """The pyramid encoder around any network and the names of its levels, first to last.

    The paper's is a ResNet-101 of ImageNet with the layers conv1, layer1 to layer4. The network is frozen: it runs in
    evaluation mode and nothing here asks for gradients.

    mean, std   of the pictures the network was trained on (ImageNet's by default)
    size        to which pictures are brought first (the paper: 224), None to leave them
    spatial     the other encoder of the authors: the last level at every place of the picture, blacked outside the
                region, `[n, places, features]`; attention then chooses among places
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        layers: Sequence[str],
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
        size: int | None = None,
        spatial: bool = False,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers is empty; name at least one layer of the network")
        for layer in layers:
            check_layer(net, layer)
        self.net, self.layers, self.size, self.spatial = net, tuple(layers), size, spatial
        self.settings: dict[str, Any] = {
            "layers": list(layers), "mean": list(mean), "std": list(std), "size": size, "spatial": spatial
        }  # fmt: skip
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1))

    @torch.no_grad()
    def forward(
        self, pictures: Float[Tensor, "n c height width"], masks: Shaped[Tensor, "n 1 height width"]
    ) -> Float[Tensor, "n ..."]:
        """Vectors of the regions of pictures in 0..1."""
        masks = masks.to(pictures.dtype)
        x = self.prepared(pictures)
        if self.spatial:
            m = interpolate(masks, x.shape[2:], mode="bilinear", align_corners=False)
            return self.levels(x * m)[-1].flatten(2).transpose(1, 2)
        return torch.cat([pool(maps, masks) for maps in self.levels(x)], 1)

    @torch.no_grad()
    def regions(
        self, pictures: Float[Tensor, "n c height width"], masks: Float[Tensor, "n r height width"]
    ) -> Float[Tensor, "n r features"]:
        """Vectors of several regions of each picture, which goes through the network once."""
        levels = self.levels(self.prepared(pictures))
        each = [torch.cat([pool(maps, m[:, None]) for maps in levels], 1) for m in masks.unbind(1)]
        return torch.stack(each, 1)

    def prepared(self, pictures: Float[Tensor, "n c height width"]) -> Float[Tensor, "n c2 height2 width2"]:
        """Pictures in 0..1 as the network takes them: in its channels, at its size, normalised."""
        pictures = pictures.expand(-1, self.mean.shape[1], -1, -1)
        if self.size is not None and pictures.shape[2:] != (self.size, self.size):
            pictures = interpolate(pictures, (self.size, self.size), mode="bilinear", align_corners=False)
        return (pictures - self.mean) / self.std

    def levels(self, x: Tensor) -> list[Float[Tensor, "n c h w"]]:
        """What each layer gives for normalised pictures."""
        seen: dict[str, Tensor] = {}
        training = [module for module in self.net.modules() if module.training]

        def look(name: str) -> Any:
            return lambda _, __, out: seen.__setitem__(name, out)

        handles = [self.net.get_submodule(name).register_forward_hook(look(name)) for name in self.layers]
        try:
            self.net.eval()
            self.net(x)
        finally:
            for handle in handles:
                handle.remove()
            for module in training:
                module.training = True
        return [seen[name] for name in self.layers]

    def encode(self, regions: ExemplarSet | tuple[Tensor, Tensor], rows: int = 8) -> Float[Tensor, "units k features"]:
        """Vectors of every unit's exemplars: a set, or `(pictures [u, k, c, h, w], masks [u, k, 1, h, w])`.

        A picture of a set goes through the network once, however many units it drives; `rows` units' worth of regions
        are in memory at a time.
        """
        if isinstance(regions, ExemplarSet) and not self.spatial:
            return self._encoded(regions, rows * regions.image_ids.shape[1])
        if isinstance(regions, ExemplarSet):
            parts = regions.batches(rows)
        else:
            parts = zip(regions[0].split(rows), regions[1].split(rows), strict=True)
        out = []
        for pictures, masks in parts:
            vectors = self(self._unit(pictures.flatten(0, 1)), masks.flatten(0, 1).to(self.mean.device))
            vectors = vectors.unflatten(0, pictures.shape[:2])
            out.append(vectors.flatten(1, 2) if self.spatial else vectors)
        return torch.cat(out)

    @torch.no_grad()
    def _encoded(self, found: ExemplarSet, together: int) -> Float[Tensor, "units k features"]:
        places = found.places
        size = (found.stored.shape[2], found.stored.shape[3])
        out: Tensor | None = None
        for start in range(0, len(found.stored), PICTURES):
            levels = self.levels(self.prepared(self._unit(found.stored[start : start + PICTURES])))
            pairs = torch.nonzero((places >= start) & (places < start + PICTURES))
            for rows, ranks in (part.unbind(1) for part in pairs.split(together)):
                masks = found.masks_of(rows, ranks, size).float().to(self.mean.device)
                each = places[rows, ranks] - start
                vectors = torch.cat([pool(maps[each], masks) for maps in levels], 1)
                out = vectors.new_zeros(*places.shape, vectors.shape[1]) if out is None else out
                out[rows, ranks] = vectors
        assert out is not None  # there are pictures, and each drives some unit
        return out

    def _unit(self, pictures: Tensor) -> Float[Tensor, "n c h w"]:
        """Pictures as numbers in 0..1, where the network is."""
        x = pictures.to(self.mean.device)
        return x.float() / 255 if x.dtype == torch.uint8 else x.float()
