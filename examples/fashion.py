"""A small convolutional network for Fashion-MNIST: trained here when first asked for, then read from the cache.

Every command that takes a model takes this one:

    neuropil atlas examples/fashion.py:network --out atlases/fashion
    neuropil describe examples/fashion.py:network --atlas atlases/fashion
    neuropil compress examples/fashion.py:network --method uniform --bits 4
    neuropil explore atlases/fashion

Copy it, and put your own network in the place of this one.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neuropil import data
from neuropil.models.assets import cache_dir, written_whole
from neuropil.training import fit, supervised

IMAGES, EPOCHS, BATCH = 30_000, 4, 100


class FashionNet(nn.Module):
    """Three convolutions, each with its batch norm, and a dense layer: 240 neurons, 58,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*block(1, 16, 1), *block(16, 32, 2), *block(32, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(64 * 4, 128)
        self.out = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(self.pool(self.features(x)).flatten(1)).relu())


def block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def network() -> nn.Module:
    """The trained network. About a minute of training on one core, the first time."""
    weights = cache_dir() / "examples" / "fashion.safetensors"
    net = FashionNet()
    if not weights.is_file():
        train(net)
        with written_whole(weights) as path:
            save_file(net.state_dict(), path)
    net.load_state_dict(load_file(weights))
    return net.eval()


def train(net: nn.Module) -> None:
    images = data.image_set("fashion-mnist")
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    steps = EPOCHS * IMAGES // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    pairs = (images.train_x[:IMAGES], images.train_y[:IMAGES])
    loss = supervised(nn.functional.cross_entropy)
    fit(net, pairs, loss, optimizer, scheduler=scheduler, steps=steps, batch_size=BATCH)
    with torch.inference_mode():
        right = (net.eval()(images.test_x).argmax(1) == images.test_y).float().mean()
    print(f"test accuracy {right:.1%}", file=sys.stderr)


if __name__ == "__main__":
    network()
