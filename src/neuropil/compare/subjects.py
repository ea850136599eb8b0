"""What is compressed in the comparison: two image models trained here, and a language model; and how good each is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil import data, evaluate
from neuropil.models import load
from neuropil.models.assets import cache_dir, written_whole
from neuropil.training import fit

TRAINED, CALIBRATION, WINDOW = 20_000, 512, 256  # images; images; tokens
RATE = 3e-4  # of all training of small models


@dataclass(frozen=True)
class Scale:
    """How much is run: epochs of training, steps of fine-tuning, images and windows of text tested on."""

    epochs: int
    finetune: int
    test: int
    windows: int


SCALES = {"smoke": Scale(1, 10, 500, 2), "default": Scale(6, 600, 10_000, 24)}


@dataclass(frozen=True)
class Subject:
    """A trained model, what it is calibrated and trained on, and how its quality is told.

    `quality` is accuracy in percent (higher is better) or perplexity (lower is better).
    """

    name: str
    model: nn.Module
    scale: Scale
    seed: int
    calibration: Sequence[Any]
    example: Any
    test: Any
    train: tuple[Tensor, Tensor] | None = None
    tokenizer: Any = None

    @property
    def language(self) -> bool:
        return self.train is None

    def quality(self, model: nn.Module) -> float:
        if self.language:
            return evaluate.perplexity(model, self.test).value
        return 100 * evaluate.accuracy(model, *self.test)

    def rate(self, model: nn.Module) -> float:
        """Tokens or images a second."""
        if self.language:
            return evaluate.generation_rate(model, self.test[0][:, :32])
        return evaluate.image_rate(model, self.test[0][:256])

    def optimizer(self, parameters: Iterable[Any], decay: float = 0.01) -> torch.optim.Optimizer:
        """AdamW at the rate that every method is trained with; `parameters` may be groups with rates of their own."""
        return torch.optim.AdamW(parameters, RATE, weight_decay=decay)

    def finetune(
        self,
        model: nn.Module,
        steps: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        callbacks: Sequence[Any] = (),
        extra: Callable[[], Tensor] | None = None,
    ) -> nn.Module:
        """Train in place, `self.optimizer` with a cosine to zero, as long as every other method that trains.

        `extra` is added to the loss; `optimizer` is given where a schedule has to know it.
        """
        assert self.train is not None
        steps = self.scale.finetune if steps is None else steps
        if optimizer is None:
            optimizer = self.optimizer(p for p in model.parameters() if p.requires_grad)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def whole(net: nn.Module, batch: Any) -> Tensor:
            return loss(net, batch) if extra is None else loss(net, batch) + extra()

        fit(
            model, self.train, whole, optimizer, scheduler=schedule, steps=steps, batch_size=64, seed=self.seed,
            callbacks=callbacks, progress=False,
        )  # fmt: skip
        return model.eval()


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of transformers' image classifiers."""
    x, y = batch
    return nn.functional.cross_entropy(model(x).logits, y)


def subject(name: str, seed: int, scale: str = "default") -> Subject:
    """`resnet` or `swin`, trained with this seed and kept in the cache folder, or `smollm2`."""
    size = SCALES[scale]
    return _language(size, seed) if name == "smollm2" else _vision(name, seed, size)


SUBJECTS = ("resnet", "swin", "smollm2")


@cache
def _images() -> data.Images:
    return data.fashion_mnist()


def _normal(pixels: Tensor) -> Tensor:
    return (pixels.reshape(-1, 1, 28, 28) - 0.2860) / 0.3530


def _vision(name: str, seed: int, scale: Scale) -> Subject:
    images = _images()
    order = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(seed))[:TRAINED]
    train = (_normal(images.train_x[order]), images.train_y[order])
    test = (_normal(images.test_x[: scale.test]), images.test_y[: scale.test])
    folder = cache_dir() / "compare" / f"{name}-{seed}-{scale.epochs}"
    model = _trained(name, seed, scale, folder, train)
    batches = list(train[0][:CALIBRATION].split(64))
    return Subject(name, model, scale, seed, batches, train[0][:1], test, train)


def vision_model(name: str) -> Any:
    """A small ResNet or Swin for images of 28 by 28, from transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification, SwinConfig, SwinForImageClassification

    common: dict[str, Any] = {"num_channels": 1, "num_labels": 10, "image_size": 28}
    if name == "resnet":
        sizes: dict[str, Any] = {
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128],
            "depths": [2, 2, 2],
            "layer_type": "basic",
        }
        return ResNetForImageClassification(ResNetConfig(**common, **sizes))
    swin: dict[str, Any] = {"patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 7}
    return SwinForImageClassification(SwinConfig(**common, **swin, drop_path_rate=0.0))


def _trained(name: str, seed: int, scale: Scale, folder: Path, train: tuple[Tensor, Tensor]) -> Any:
    torch.manual_seed(seed)
    model = vision_model(name)
    if (folder / "config.json").is_file():
        return type(model).from_pretrained(folder, local_files_only=True).eval()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    total = scale.epochs * -(-len(train[0]) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total)
    fit(model, train, loss, optimizer, scheduler=schedule, steps=total, batch_size=64, seed=seed)
    with written_whole(folder) as path:
        model.save_pretrained(path)
    return model.eval()


def _language(scale: Scale, seed: int) -> Subject:
    """SmolLM2; a seed chooses the text it is calibrated on. The text it is tested on is the same for all."""
    model = load("smollm2")
    texts = data.text("brown")
    order = torch.randperm(len(texts.train), generator=torch.Generator().manual_seed(seed)).tolist()
    calibration = evaluate.windows([texts.train[i] for i in order[:40]], model.tokenizer, WINDOW, limit=16)
    test = evaluate.windows(texts.test, model.tokenizer, WINDOW, limit=scale.windows)
    whole = copy.deepcopy(model.module())
    return Subject(
        "smollm2", whole, scale, seed, calibration, {"input_ids": test[0][:, :8], "use_cache": False}, test,
        tokenizer=model.tokenizer,
    )  # fmt: skip
