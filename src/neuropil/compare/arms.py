"""The ways to make a model smaller that are compared: ours, and peers' that many people use today."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.compare import trained
from neuropil.compare.subjects import Subject
from neuropil.compress.coreinfer import CoreInfer
from neuropil.compress.recipes import compress
from neuropil.compress.sparse import prunable
from neuropil.models.assets import smollm2
from neuropil.packed import nbytes, packed_modules

Make = Callable[[Subject], nn.Module]


@dataclass(frozen=True)
class Arm:
    """One method at one setting. `make` gives a smaller copy of the subject's model.

    `kind` groups the arms: "original", "bits" (fewer bits a weight), "zeros" (fewer weights), "neurons" (smaller
    tensors), "run time" (less is computed, nothing is smaller). `trained` arms are fine-tuned for equally many steps.
    """

    name: str
    kind: str
    make: Make
    on: tuple[str, ...] = ("resnet", "swin", "smollm2")
    peer: bool = False
    trained: bool = False
    calibrated: bool = False
    kernel: bool = False  # its packed weights are multiplied as they are, in bfloat16; else made dense once
    stored: Callable[[], int] | None = None  # bytes of a file that others' programs run: its speed is not ours to tell

    def seeded(self, subject: str) -> bool:
        """Whether another seed gives another outcome."""
        return subject != "smollm2" or self.calibrated


def _recipe(method: str, **settings: Any) -> Make:
    def make(subject: Subject) -> nn.Module:
        return compress(
            subject.model, method, calibration=subject.calibration, example=subject.example, **settings
        ).model

    return make


def _fewer_neurons(sparsity: float) -> Make:
    """Neurons taken out, and what is left trained."""
    return lambda subject: subject.finetune(_recipe("neurons", sparsity=sparsity)(subject))


def _low(subject: Subject) -> nn.Module:
    return copy.deepcopy(subject.model).to(torch.bfloat16)


def _torchao(config: str, **settings: Any) -> Make:
    def make(subject: Subject) -> nn.Module:
        from torchao import quantization

        model = _low(subject) if subject.language else copy.deepcopy(subject.model)
        quantization.quantize_(model, getattr(quantization, config)(**settings))
        return model

    return make


def _quanto(weights: str) -> Make:
    def make(subject: Subject) -> nn.Module:
        from optimum import quanto

        model = copy.deepcopy(subject.model)
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        return model

    return make


def _torch_prune(sparsity: float) -> Make:
    """Each layer's smallest weights zero; torch keeps the zeros."""

    def make(subject: Subject) -> nn.Module:
        from torch.nn.utils import prune

        model = copy.deepcopy(subject.model)
        for layer in prunable(model)[0].values():
            prune.l1_unstructured(layer, "weight", amount=sparsity)
            prune.remove(layer, "weight")
        return model

    return make


def _torch_pruning(ratio: float) -> Make:
    """The library's own choice of channels, those of residual streams included; what is left is trained."""

    def make(subject: Subject) -> nn.Module:
        import torch_pruning as tp

        model = copy.deepcopy(subject.model).train()
        heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
        tp.pruner.BasePruner(
            model, subject.example, tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
            ignored_layers=heads, output_transform=lambda out: out.logits,
        ).step()  # fmt: skip
        return subject.finetune(model)

    return make


class _Core(nn.Module):
    """Answers with CoreInfer. A text that is scored in one pass is read as a prompt and its continuation."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        super().__init__()
        self.model = model
        CoreInfer(model, keep).__enter__()  # for as long as this copy lives

    def forward(self, ids: Tensor, use_cache: bool = False, past_key_values: Any = None) -> Any:
        if use_cache:
            return self.model(ids, use_cache=True, past_key_values=past_key_values)
        prompt = self.model(ids[:, : ids.shape[1] // PROMPT], use_cache=True)
        rest = self.model(ids[:, ids.shape[1] // PROMPT :], use_cache=True, past_key_values=prompt.past_key_values)
        rest.logits = torch.cat([prompt.logits, rest.logits], 1)
        return rest


def _core(keep: float) -> Make:
    return lambda subject: _Core(copy.deepcopy(subject.model), keep)


PROMPT = 4  # a scored text's first quarter is the prompt that tells the core neurons
VISION, LANGUAGE = ("resnet", "swin"), ("smollm2",)

ARMS: tuple[Arm, ...] = (
    Arm("float32", "original", lambda subject: subject.model),
    Arm("bfloat16", "original", _low, LANGUAGE),
    Arm("uniform 8", "bits", _recipe("uniform", bits=8), kernel=True),
    Arm("uniform 4, groups of 32", "bits", _recipe("uniform", bits=4, group=32), LANGUAGE, kernel=True),
    Arm("uniform 4", "bits", _recipe("uniform", bits=4), kernel=True),
    Arm("uniform 3", "bits", _recipe("uniform", bits=3), kernel=True),
    Arm("uniform 3, groups of 32", "bits", _recipe("uniform", bits=3, group=32), LANGUAGE, kernel=True),
    Arm("uniform 2", "bits", _recipe("uniform", bits=2), kernel=True),
    Arm("uniform 2, groups of 32", "bits", _recipe("uniform", bits=2, group=32), LANGUAGE, kernel=True),
    Arm("ternary", "bits", _recipe("ternary"), VISION),
    Arm("NUPES 4", "bits", _recipe("nupes", bits=4)),
    Arm("NUPES 3", "bits", _recipe("nupes", bits=3)),
    Arm("NUPES 2", "bits", _recipe("nupes", bits=2)),
    Arm("JLCM 3", "bits", _recipe("jlcm", bits=3)),
    Arm("JLCM 2", "bits", _recipe("jlcm", bits=2)),
    Arm("AdaRound 3, calibrated", "bits", _recipe("adaround", bits=3), VISION, calibrated=True),
    Arm("AdaRound 2, calibrated", "bits", _recipe("adaround", bits=2), VISION, calibrated=True),
    Arm("NUPES 2, calibrated", "bits", trained.nupes(2), VISION, calibrated=True),
    Arm("JLCM 2, calibrated", "bits", trained.jlcm(2), VISION, calibrated=True),
    Arm("magnitude 0.5", "zeros", _recipe("magnitude", sparsity=0.5)),
    Arm("DIMAP 0.5", "zeros", _recipe("dimap", sparsity=0.5)),
    Arm("neurons 0.1", "neurons", _recipe("neurons", sparsity=0.1), LANGUAGE, calibrated=True),
    Arm("neurons 0.3", "neurons", _recipe("neurons", sparsity=0.3), LANGUAGE, calibrated=True),
    Arm("core neurons 0.3", "neurons", _recipe("core", sparsity=0.3), LANGUAGE, calibrated=True),
    Arm("LSQ 3, trained", "bits", trained.lsq(3), VISION, trained=True),
    Arm("LSQ 2, trained", "bits", trained.lsq(2), VISION, trained=True),
    Arm("OFQ 2, inputs 4, trained", "bits", trained.ofq(2, 4), ("swin",), trained=True),
    Arm("BiPer 1, trained", "bits", trained.biper, VISION, trained=True),
    Arm("magnitude 0.7, trained", "zeros", trained.magnitude(0.7), VISION, trained=True),
    Arm("magnitude 0.9, trained", "zeros", trained.magnitude(0.9), VISION, trained=True),
    Arm("DIMAP 0.7, trained", "zeros", trained.dimap(0.7), VISION, trained=True),
    Arm("DIMAP 0.9, trained", "zeros", trained.dimap(0.9), VISION, trained=True),
    Arm("GraNet 0.9, trained", "zeros", trained.granet(0.1), VISION, trained=True),
    Arm("AP 0.9, trained", "zeros", trained.activating(0.9), ("resnet",), trained=True),
    Arm("Turbo-VBI, trained", "zeros", trained.turbo_vbi, VISION, trained=True),
    Arm("neurons 0.3, trained", "neurons", _fewer_neurons(0.3), VISION, trained=True),
    Arm("neurons 0.5, trained", "neurons", _fewer_neurons(0.5), VISION, trained=True),
    Arm("CoreInfer 0.4", "run time", _core(0.4), LANGUAGE),
    Arm("CoreInfer 0.7", "run time", _core(0.7), LANGUAGE),
    Arm(
        "llama.cpp Q4_1",
        "bits",
        lambda subject: subject.model,
        LANGUAGE,
        peer=True,
        stored=lambda: smollm2().stat().st_size,
    ),
    Arm("torch prune 0.5", "zeros", _torch_prune(0.5), peer=True),
    Arm("torch-pruning 0.3, trained", "neurons", _torch_pruning(0.3), ("resnet",), peer=True, trained=True),
    Arm("torch-pruning 0.5, trained", "neurons", _torch_pruning(0.5), ("resnet",), peer=True, trained=True),
    Arm("torchao int8", "bits", _torchao("Int8WeightOnlyConfig"), LANGUAGE, peer=True),
    Arm("quanto int8", "bits", _quanto("qint8"), peer=True),
    Arm("quanto int4", "bits", _quanto("qint4"), LANGUAGE, peer=True),
    Arm("quanto int2", "bits", _quanto("qint2"), LANGUAGE, peer=True),
)


def size(model: nn.Module) -> int:
    """Bytes of all that is kept of a model; of a peer's, as torch saves it."""
    if any(True for _ in packed_modules(model)) or all(type(p) is nn.Parameter for p in model.parameters()):
        return nbytes(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes
