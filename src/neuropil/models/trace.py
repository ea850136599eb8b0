"""Which norm feeds which layer: seen in one forward pass on the meta device, where tensors have no data.

A norm feeds a weight when the tensor that the weight's module receives is the norm's own output or a view
of it. That is told by the tensors' storage, so it needs no list of architectures or of names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class _Answers(TorchDispatchMode):
    """Answers the questions that a model asks of values, which tensors on the meta device do not have.

    "Is the mask all ones?": yes. "Where is it non-zero?": at one place.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is torch.ops.aten._local_scalar_dense.default:
                return True if first.dtype is torch.bool else 1
            if func is torch.ops.aten.nonzero.default:
                return torch.zeros(1, first.dim(), dtype=torch.long, device="meta")
            if func is torch.ops.aten.equal.default:
                return True
            if "grouped_mm" in str(func):  # its meta version takes bfloat16 alone
                return first.new_empty(*first.shape[:-1], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


@dataclass
class Trace:
    """What was seen: for a module watched, the module (norm or linear map) whose output it received."""

    feeds: dict[str, str] = field(default_factory=dict)
    last_norm: str | None = None
    widths: dict[str, int] = field(default_factory=dict)


def is_norm(module: nn.Module) -> bool:
    """A module that owns a vector called weight and whose class is called a norm."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def watch(model: nn.Module, watched: Iterable[str]) -> Trace | None:
    """Run the model once on a made-up input and say what feeds each watched module; None if it cannot be run.

    The model is left as it was, in the mode it was.
    """
    trace = Trace()
    owners: dict[int, str] = {}
    kept: list[Tensor] = []  # a storage must outlive the pass, or another could take its identity
    norms = {name for name, module in model.named_modules() if is_norm(module)}

    def produced(name: str, *, norm: bool) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                kept.append(output)
                owners[output.untyped_storage()._cdata] = name
                if norm:
                    trace.last_norm = name

        return hook

    def received(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if given is not None:
                trace.widths[name] = given.shape[-1]
                if (source := owners.get(given.untyped_storage()._cdata)) is not None:
                    trace.feeds[name] = source

        return hook

    was_training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for name, module in model.named_modules():
            outside = not any(part.isdecimal() for part in name.split("."))
            if name in norms or (outside and isinstance(module, nn.Linear)):
                stack.enter_context(_hook(module.register_forward_hook(produced(name, norm=name in norms))))
        for name in set(watched):
            module = model.get_submodule(name)
            stack.enter_context(_hook(module.register_forward_pre_hook(received(name), with_kwargs=True)))
        try:
            model.eval()
            with torch.no_grad(), _Answers():
                model(**example(model))
        except Exception:  # any architecture may need inputs of its own: then there is simply no trace
            return None
        finally:
            for module in was_training:
                module.training = True
    return trace


def last_norm(model: nn.Module, trace: Trace | None) -> str | None:
    """The norm that ran last; where the model could not be run, one that is in none of its blocks."""
    if trace is not None:
        return trace.last_norm
    outside = (
        name
        for name, module in model.named_modules()
        if is_norm(module) and "embed" not in name and not any(part.isdecimal() for part in name.split("."))
    )
    return max(outside, key=lambda name: -name.count("."), default=None)


class _hook(ExitStack):  # noqa: N801 - a small context manager, used as a function
    def __init__(self, handle: Any) -> None:
        super().__init__()
        self.callback(handle.remove)


def example(model: nn.Module) -> dict[str, Tensor]:
    """A made-up input: four token ids, or one image."""
    config: Any = getattr(model, "config", None)
    device = next(model.parameters()).device
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.zeros(1, channels, height, width, device=device)}
    ids = torch.ones(1, 4, dtype=torch.long, device=device)
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    elif "CausalLM" in type(model).__name__:
        inputs["use_cache"] = False  # type: ignore[assignment]
    return inputs


def measured_gain(norm: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    """The vector by which a norm multiplies its normalised input: `g`, in Gemma `1 + g`; it is measured.

    The norm is given `x` of +1 and -1 (mean 0, mean square 1) and `-x`; half the difference is `gain * x`.
    """
    local = copy.deepcopy(norm).to_empty(device="cpu").float()
    for name, parameter in [*local.named_parameters(), *local.named_buffers()]:
        parameter.data.copy_(weights[name])
    stored = weights["weight"].float()
    x = torch.ones(stored.shape[0])
    x[1::2] = -1
    with torch.no_grad():
        seen = (local(x[None, None]) - local(-x[None, None]))[0, 0] / 2 * x
    candidates = (stored, 1 + stored)
    errors = [float((seen - candidate).abs().max()) for candidate in candidates]
    best = min(range(2), key=errors.__getitem__)
    # The norm's epsilon and an odd width shift what is measured a little; the stored vector is exact.
    return candidates[best] if errors[best] < 1e-2 * (1 + float(seen.abs().max())) else seen
