"""The vision transformer of the paper, with the names of the authors' checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.layers._kat_fit import Init
from neuropil.layers._kat_mlp import GRKANMlp

MakeMlp = Callable[[int, int], nn.Module]


class Attention(nn.Module):
    """Multi-head self-attention, the projections of queries, keys and values in one matrix."""

    def __init__(self, dim: int, heads: int, drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{dim} channels in {heads} heads; expected heads of equal size")
        self.heads, self.drop = heads, drop
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class DropPath(nn.Module):
    """In training, drops the whole branch for some examples and scales it up for the others."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path is {rate}; expected a probability below 1")
        self.rate = rate

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class KATBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), the MLP being a `GRKANMlp` (or what `mlp` makes).

    dim, heads, mlp_ratio    channels, attention heads, hidden channels over channels
    drop, attn_drop, drop_path    of the outputs of both branches, of attention weights, of whole branches
    mlp    makes the MLP for (channels, hidden channels), for comparisons; `options` go to `GRKANMlp` otherwise

    >>> KATBlock(32, 4)(torch.randn(2, 9, 32)).shape
    torch.Size([2, 9, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        mlp: MakeMlp | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, hidden) if mlp is not None else GRKANMlp(dim, hidden, drop=drop, **options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, channels: int, dim: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, size, stride=size)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b t d"]:
        return self.proj(x).flatten(2).transpose(1, 2)


class KAT(nn.Module):
    """The Kolmogorov-Arnold Transformer: a ViT whose MLPs are GR-KANs. Images in, logits `[batch, classes]` out.

    image_size, patch_size, in_channels, num_classes    of square images; the class token is classified
    dim, depth, heads, mlp_ratio    channels, blocks, attention heads, hidden channels over channels
    drop, attn_drop, drop_path      as in `KATBlock`; drop_path grows linearly from 0 to this over the blocks
    weight_init    "paper": MLPs keep the variance; "released": as the authors' code; "torch": MLPs as torch's Linear
    act_init, groups, denominator, share    see `GRKANMlp`
    mlp            see `KATBlock`

    Names in the state dict are those of timm's ViT and of the authors' checkpoints, so these load with
    `load_state_dict`; `load_vit` starts from a ViT. The paper trains it with AdamW (1e-3, weight decay 0.05 but not on
    `no_weight_decay()`), a cosine of 300 epochs, batch 1024, and the augmentations of DeiT.

    >>> model = KAT(image_size=16, patch_size=4, in_channels=1, num_classes=10, dim=32, depth=2, heads=4)
    >>> model(torch.randn(3, 1, 16, 16)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        *,
        act_init: tuple[Init, Init] = ("identity", "swish"),
        groups: int = 8,
        denominator: str = "A",
        share: str = "numerator",
        weight_init: str = "paper",
        mlp: MakeMlp | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"images of {image_size} in patches of {patch_size}; expected a whole number of patches")
        self.image_size, self.weight_init = image_size, weight_init
        options: dict[str, Any] = {"act_init": act_init, "groups": groups, "denominator": denominator, "share": share}
        options |= {"weight_init": weight_init}
        rates = [drop_path * block / max(depth - 1, 1) for block in range(depth)]
        self.patch_embed = _Patches(in_channels, dim, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2 + 1, dim))
        self.pos_drop = nn.Dropout(drop)
        self.blocks = nn.Sequential(
            *(KATBlock(dim, heads, mlp_ratio, drop, attn_drop, rate, mlp, **options) for rate in rates)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """As timm's ViT outside the MLPs, which have done it for themselves."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        for linear in (self.head, *(part for one in attentions for part in (one.qkv, one.proj))):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.weight_init == "released":
            for attention in attentions:
                _mimetic(attention)

    def no_weight_decay(self) -> set[str]:
        """Parameters that the paper's training does not decay."""
        return {"pos_embed", "cls_token"}

    def load_vit(self, state: Mapping[str, Tensor]) -> None:
        """Take all weights of a ViT in timm's naming; the rationals stay as they are.

        With act_init=("identity", "gelu") the model then computes what the ViT does, up to the error of the fit.
        Raises ValueError where other parameters than the rationals' are missing or left over.
        """
        own = {name for name in self.state_dict() if ".act1." in name or ".act2." in name}
        missing, unexpected = set(self.state_dict()) - own - set(state), set(state) - set(self.state_dict())
        if missing or unexpected:
            raise ValueError(f"not the weights of this ViT: missing {sorted(missing)}, left over {sorted(unexpected)}")
        self.load_state_dict(state, strict=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Raises ValueError for images of another size."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images of {tuple(images.shape[-2:])}; expected {self.image_size} x {self.image_size}")
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(self.pos_drop(x)))[:, 0])


@torch.no_grad()
def _mimetic(attention: Attention) -> None:
    """Queries and keys whose product is near the identity, values and projection whose product is near minus it."""
    q, k, v = attention.qkv.weight.chunk(3)
    size = len(q) // attention.heads
    for head in range(attention.heads):
        left, right = _halves(len(q), 0.7, 0.7)
        rows = slice(head * size, (head + 1) * size)
        q[rows], k[rows] = left[:, :size].T, right[:size]
    left, right = _halves(len(q), 0.4, -0.4)
    v.copy_(left)
    attention.proj.weight.copy_(right)


def _halves(dim: int, noise: float, identity: float) -> tuple[Tensor, Tensor]:
    """Two factors, equally large, of noise x uniform (variance 1 / dim) + identity x I."""
    uniform = (2 * torch.rand(dim, dim) - 1) * (3 / dim) ** 0.5
    u, s, v = torch.linalg.svd(noise * uniform + identity * torch.eye(dim))
    return u * s.sqrt(), s.sqrt()[:, None] * v


def kat_tiny(**options: Any) -> KAT:
    """KAT-T: 192 channels, 12 blocks, 3 heads; drop-path 0.1 as the paper trains it. `options` go to `KAT`."""
    return KAT(**{"dim": 192, "depth": 12, "heads": 3, "drop_path": 0.1, **options})


def kat_small(**options: Any) -> KAT:
    """KAT-S: 384 channels, 12 blocks, 6 heads; drop-path 0.1 as the paper trains it. `options` go to `KAT`."""
    return KAT(**{"dim": 384, "depth": 12, "heads": 6, "drop_path": 0.1, **options})


def kat_base(**options: Any) -> KAT:
    """KAT-B: 768 channels, 12 blocks, 12 heads; drop-path 0.4 as the paper trains it. `options` go to `KAT`."""
    return KAT(**{"dim": 768, "depth": 12, "heads": 12, "drop_path": 0.4, **options})
