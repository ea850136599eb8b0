"""The arms that learn: from calibration images layer by layer, or trained, all for the same number of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from neuropil.compare.subjects import RATE, Subject
from neuropil.compress import (
    ActivateWhilePruning,
    GraNet,
    HMMPrior,
    TurboVBI,
    bake,
    bake_masks,
    binarize_model,
    dimap_prune,
    learn_codebooks,
    nupes_quantize,
    ofq_bake,
    ofq_quantize,
    pack_sparse,
    prune_magnitude,
    qat_prepare,
)
from neuropil.compress.biper import set_stage
from neuropil.compress.masks import hold_masks
from neuropil.compress.quantize import LSQ
from neuropil.compress.recipes import STEPS

Make = Callable[[Subject], nn.Module]


def held(prune: Callable[[nn.Module], nn.Module]) -> Make:
    """`prune(model)` gives a copy whose masks are held; what is left is trained."""

    def make(subject: Subject) -> nn.Module:
        model = subject.finetune(prune(subject.model))
        bake_masks(model)
        return pack_sparse(model).model

    return make


def magnitude(sparsity: float) -> Make:
    def prune(model: nn.Module) -> nn.Module:
        pruned = prune_magnitude(model, sparsity)
        masks = {f"{name}.weight": pruned.model.get_parameter(f"{name}.weight") != 0 for name in pruned.changed}
        hold_masks(pruned.model, masks)
        return pruned.model

    return held(prune)


def dimap(ratio: float) -> Make:
    return held(lambda model: dimap_prune(model, ratio, hold=True).model)


def granet(density: float) -> Make:
    def make(subject: Subject) -> nn.Module:
        model = copy.deepcopy(subject.model)
        steps = subject.scale.finetune
        every = max(1, steps // 20)
        optimizer = subject.optimizer(model.parameters())
        schedule = GraNet(model, optimizer, density=(1.0, density), steps=(0, steps // 2, steps), every=every)
        subject.finetune(model, optimizer=optimizer, callbacks=[lambda run: schedule.step()])
        schedule.remove()
        return pack_sparse(model).model

    return make


def activating(sparsity: float, cycles: int = 4) -> Make:
    """Cycles of equal length in place of the paper's whole trainings; weights are not rewound."""

    def make(subject: Subject) -> nn.Module:
        model = copy.deepcopy(subject.model)
        optimizer = subject.optimizer(model.parameters())
        rate = 1 - (1 - sparsity) ** (1 / cycles)
        every = max(1, subject.scale.finetune // (cycles + 1))
        pruning = ActivateWhilePruning(
            model, optimizer, every=every, cycles=cycles, rate=rate, ap_rate=0.1 * rate, rewind=None
        )
        subject.finetune(model, optimizer=optimizer, callbacks=[lambda run: pruning.step()])
        pruning.remove()
        return pack_sparse(model).model

    return make


def turbo_vbi(subject: Subject) -> nn.Module:
    """The density is the posterior's own."""
    assert subject.train is not None
    model = copy.deepcopy(subject.model)
    steps = subject.scale.finetune
    every = max(1, steps // 30)
    vbi = TurboVBI(
        model, HMMPrior.of(density=0.2, run=5.0), data_size=len(subject.train[0]), every=every, warmup=steps // 3
    )
    wide = [p for name, p in model.named_parameters() if name.endswith("log_variance")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("log_variance")]
    optimizer = subject.optimizer([{"params": rest}, {"params": wide, "lr": 10 * RATE}], decay=0.0)
    subject.finetune(model, optimizer=optimizer, callbacks=[lambda run: vbi.step()], extra=vbi.kl)
    return pack_sparse(vbi.prune().model).model


def nupes(bits: int) -> Make:
    return lambda subject: (
        nupes_quantize(
            subject.model, bits, ends=None, calibration=subject.calibration, steps=STEPS, seed=subject.seed
        ).model
    )


def jlcm(bits: int) -> Make:
    return lambda subject: (
        learn_codebooks(subject.model, bits, calibration=subject.calibration, steps=STEPS, seed=subject.seed).model
    )


def lsq(bits: int) -> Make:
    """Quantization-aware training with a learned step a channel; activations stay as they are."""

    def make(subject: Subject) -> nn.Module:
        return bake(subject.finetune(qat_prepare(subject.model, LSQ(bits, granularity="channel")).model)).model

    return make


def biper(subject: Subject) -> nn.Module:
    """Weights of one bit, inputs as they are; half of the steps in each stage."""
    model = binarize_model(subject.model, binary_inputs=False).model
    half = subject.scale.finetune // 2
    subject.finetune(model, steps=half)
    set_stage(model, 2)
    return bake(subject.finetune(model, steps=subject.scale.finetune - half)).model


def ofq(bits: int, activations: int) -> Make:
    def make(subject: Subject) -> nn.Module:
        made: Any = ofq_quantize(subject.model, bits, activations, calibration=subject.calibration)
        return ofq_bake(subject.finetune(made.model)).model

    return make
