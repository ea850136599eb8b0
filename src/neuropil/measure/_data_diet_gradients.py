"""Per-example gradients of a classifier: their norms, exactly and for the last layer alone, and their kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from neuropil.errors import ModelError
from neuropil.evaluate import evaluating
from neuropil.measure._data_diet_examples import (
    Examples,
    Function,
    Inputs,
    device_of,
    logits_of,
    moved,
)

Gradients = dict[str, Tensor]


def error_vectors(logits: Float[Tensor, "b c"], y: Tensor) -> Float[Tensor, "b c"]:
    """$p - y$, in float64: softmax for integer labels, sigmoid for several labels an example."""
    logits = logits.detach().cpu().double()
    y = y.cpu()
    if y.ndim == 2:
        return logits.sigmoid() - y
    return logits.softmax(1) - nn.functional.one_hot(y.long(), logits.shape[1])


def losses(logits: Float[Tensor, "b c"], y: Tensor) -> Float[Tensor, " b"]:
    """Cross-entropy of each example, whose gradient in the logits is $p - y$; summed over labels if several."""
    y = y.to(logits.device)
    if y.ndim == 2:
        binary = nn.functional.binary_cross_entropy_with_logits
        return binary(logits, y.to(logits.dtype), reduction="none").sum(1)
    return nn.functional.cross_entropy(logits, y.long(), reduction="none")


def gradient_norms(model: nn.Module) -> Function:
    """GraNd: the norm of each example's loss gradient over all trainable parameters."""

    def loss(state: Gradients, inputs: Inputs, y: Tensor) -> Tensor:
        return losses(logits_of(model, _batched(inputs), state), y[None])[0]

    return lambda inputs, y: _norms(_per_example(model, grad(loss), inputs, y))


def last_layer_norms(model: nn.Module) -> Function:
    """The same over the last linear layer alone: $|p - y| \\sqrt{|h|^2 + 1}$, from one forward pass."""

    def norms(inputs: Inputs, y: Tensor) -> Tensor:
        logits, hidden, bias = _last_layer(model, inputs)
        length = hidden.cpu().double().square().sum(1) + float(bias)
        return error_vectors(logits, y).norm(dim=1) * length.sqrt()

    return norms


def centred_norms(model: nn.Module, examples: Examples, batch_size: int) -> Function:
    """The norm of the gradient of the summed logits after its class-balanced mean was subtracted."""
    y = examples.labels
    if y.ndim != 1:
        raise ValueError("the class-centred score needs one integer label an example")
    _, place, counts = y.unique(return_inverse=True, return_counts=True)
    share = 1 / (len(counts) * counts[place].double())
    weights = torch.zeros(len(examples.distinct), dtype=torch.float64).index_add(0, examples.which, share)
    mean: Gradients = {}

    def total(state: Gradients, inputs: Inputs, y: Tensor) -> Tensor:
        return logits_of(model, _batched(inputs), state).sum()

    for weight, (inputs, labels) in zip(weights.split(batch_size), examples.batches(batch_size), strict=True):
        for name, values in _per_example(model, grad(total), inputs, labels).items():
            mean[name] = mean.get(name, 0) + torch.einsum("b,b...->...", weight.to(values), values)

    def norms(inputs: Inputs, y: Tensor) -> Tensor:
        found = _per_example(model, grad(total), inputs, y)
        return _norms({name: values - mean[name] for name, values in found.items()})

    return norms


def logit_kernel(model: nn.Module, inputs: Inputs) -> Float[Tensor, "nc nc"]:
    """Inner products of the gradients of all logits of all examples, the examples' logits side by side."""

    def one(state: Gradients, inputs: Inputs) -> Tensor:
        return logits_of(model, _batched(inputs), state)[0]

    with evaluating(model), torch.no_grad():
        rows = vmap(jacrev(one), in_dims=(None, 0))(trainable(model), moved(inputs, device_of(model)))
        flat = [values.flatten(0, 1).flatten(1).double() for values in rows.values()]
        return torch.stack([values @ values.T for values in flat]).sum(0)


def trainable(model: nn.Module) -> Gradients:
    found = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ModelError("the model has no trainable parameter, so no gradient; unfreeze some (requires_grad_)")
    return found


def _per_example(model: nn.Module, gradient: Callable[..., Any], inputs: Inputs, y: Tensor) -> Gradients:
    device = device_of(model)
    try:
        return vmap(gradient, in_dims=(None, 0, 0))(trainable(model), moved(inputs, device), y.to(device))
    except RuntimeError as error:
        raise ModelError(
            f"torch.func cannot take this model's gradients example by example ({error}); use the last-layer form, "
            "or a smaller batch_size if memory ran out"
        ) from error


def _norms(gradients: Gradients) -> Float[Tensor, " b"]:
    """Of each example, over all parameters: joined on the CPU, for not every device has float64."""

    def one(values: Tensor) -> Tensor:
        kind = torch.promote_types(values.dtype, torch.float32)
        return torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=kind).cpu().double()

    return torch.stack([one(values) for values in gradients.values()]).norm(dim=0)


def _batched(inputs: Any) -> Any:
    """One example as a batch of one."""
    return {name: values[None] for name, values in inputs.items()} if isinstance(inputs, dict) else inputs[None]


def _last_layer(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor, bool]:
    """The logits, what the linear layer read that gave them, and whether it has a bias."""
    seen: list[tuple[Tensor, Tensor, bool]] = []

    def note(module: nn.Linear, given: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append((out, given[0], module.bias is not None))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            logits = logits_of(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for out, hidden, bias in seen:
        if out is logits:
            return logits, hidden, bias
    raise ModelError("the logits are not the output of an nn.Linear, so there is no last-layer form; use exact GraNd")
