r"""What quantization did to each layer: bits, bytes, error of the weight and of the answer.

>>> from neuropil.compress.quantize import quantize_model
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
>>> changes = quantize_model(model, {"bits": 4, "granularity": "channel"}, skip=["2"])
>>> print(report(model, changes, [torch.randn(32, 64)]))
layer  shape     bits  bytes  weight error  output error
0      64 x 64   4.51   2308        0.44 %        0.48 %
2      10 x 64  32.00   2560                              skipped as asked
total            8.22   4868
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neuropil.changes import Changes
from neuropil.compress.quantize.models import weight_of
from neuropil.compress.quantize.tiles import LAYERS
from neuropil.compress.reconstruction import walk
from neuropil.packed import nbytes, packed_modules


@dataclass(frozen=True)
class LayerReport:
    """One layer. Errors are squared errors over squared size; None where a layer was left or there were no batches.

    `output_error` compares what the layer answers in the quantized model, where all before it is rounded too, with its
    answer in the plain one.
    """

    name: str
    shape: tuple[int, ...]
    bits: float
    bytes: int
    weight_error: float | None = None
    output_error: float | None = None
    left: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """All layers; prints as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all the weights listed."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bits(self) -> float:
        """Stored bits a weight over all layers."""
        return 8 * self.bytes / max(1, sum(torch.Size(layer.shape).numel() for layer in self.layers))

    def __str__(self) -> str:
        def share(x: float | None) -> str:
            return "" if x is None else f"{100 * x:.2f} %"

        head = ["layer", "shape", "bits", "bytes", "weight error", "output error", ""]
        rows = [
            [
                *(each.name or "(the model)", " x ".join(map(str, each.shape)), f"{each.bits:.2f}", str(each.bytes)),
                *(share(each.weight_error), share(each.output_error), each.left),
            ]
            for each in self.layers
        ]
        rows = [head, *rows, ["total", "", f"{self.bits:.2f}", str(self.bytes), "", "", ""]]
        wide = [max(len(row[k]) for row in rows) for k in range(7)]
        left = (0, 1, 6)
        lines = [
            "  ".join(
                cell.ljust(w) if k in left else cell.rjust(w) for k, (cell, w) in enumerate(zip(r, wide, strict=True))
            )
            for r in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def report(plain: nn.Module, changes: Changes, batches: Iterable[Any] | None = None) -> QuantizationReport:
    """What became of each layer of `plain`: `changes` is what a method of this package gave. Tied layers count once.

    With `batches`, the errors of answers as well; one run of both models for each layer. A method that folds or
    equalises changes weights before it rounds them: compare with the model it rounded (`fold(model)[0].model`).
    """
    packings = {name: packing for name, _, packing in packed_modules(changes.model)}
    modules = {name: m for name, m in plain.named_modules() if isinstance(m, LAYERS)}
    errors = _output_errors(plain, changes.model, [n for n in modules if n in packings], batches)
    rows, seen = [], set()
    for name, module in modules.items():
        if id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        weight = weight_of(module)
        packing = packings.get(name)
        if packing is None:
            why = changes.left.get(name, "not packed")
            rows.append(LayerReport(name, tuple(weight.shape), 8.0 * weight.element_size(), weight.nbytes, left=why))
            continue
        error = (packing.dense().double() - weight.double()).square().sum() / weight.double().square().sum()
        size = nbytes(packing)
        rows.append(
            LayerReport(name, tuple(weight.shape), packing.bits, size, float(error.nan_to_num()), errors.get(name))
        )
    return QuantizationReport(tuple(rows))


def _output_errors(
    plain: nn.Module, made: nn.Module, names: list[str], batches: Iterable[Any] | None
) -> dict[str, float]:
    if batches is None or not names:
        return {}
    errors = {}
    for seen in walk(plain, names, batches, inputs_from=made):
        layer, wrong, size = made.get_submodule(seen.name), 0.0, 0.0
        for call in seen.calls:
            wrong += float((layer(*call.args, **call.kwargs) - call.output).double().square().sum())
            size += float(call.output.double().square().sum())
        errors[seen.name] = wrong / size if size else 0.0
    return errors
