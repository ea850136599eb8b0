"""Seeing and replacing tensors on their way through a model: module hooks, and interception of matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from neuropil.neurons import Tap

Act = Callable[[Tensor], Tensor | None]

# Positions of the two operands among the arguments.
_OPERANDS = {
    "linear": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1), "bmm": (0, 1), "grouped_mm": (0, 1),
    "_grouped_mm": (0, 1), "grouped_mm_fallback": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "einsum": (1, 2),
    "conv1d": (0, 1), "conv2d": (0, 1), "__rmatmul__": (0, 1),
}  # fmt: skip


@contextmanager
def tapped(model: nn.Module, taps: Iterable[tuple[Tap, int, Act]]) -> Iterator[None]:
    """Pass the tensor at each tap through a function; what it returns, if not None, replaces the tensor.

    The number is that of the site's neurons, 0 for the whole tensor.
    """
    products: list[tuple[Tap, int, Act]] = []
    with ExitStack() as stack:
        for tap, width, act in taps:
            if tap.parameter:
                products.append((tap, width, act))
            else:
                handle = _hook(model.get_submodule(tap.module), tap, width, act)
                stack.callback(handle.remove)
        if products:
            for name in {tap.module for tap, _, _ in products}:
                stack.enter_context(_visible_products(model.get_submodule(name)))
            stack.enter_context(_Products(model, products))
        yield


def _change(whole: Tensor, tap: Tap, width: int, act: Act) -> Tensor | None:
    """Apply `act` to the neurons' part of a tensor; the tensor with that part replaced, or None."""
    if tap.start == 0 and tap.step == 1 and (width == 0 or whole.shape[tap.axis] == width):
        return act(whole)
    changed = act(_own(whole, tap, width))
    if changed is None:
        return None
    whole = whole.clone()
    _own(whole, tap, width).copy_(changed)
    return whole


def _own(whole: Tensor, tap: Tap, width: int) -> Tensor:
    part = whole.narrow(tap.axis, tap.start, tap.step * (width - 1) + 1)
    return part[(..., slice(None, None, tap.step)) + (slice(None),) * (-1 - tap.axis)]


def _hook(module: nn.Module, tap: Tap, width: int, act: Act) -> Any:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:  # a module called by keyword alone
            key = next(k for k, v in kwargs.items() if isinstance(v, Tensor))
            changed = _change(kwargs[key], tap, width, act)
            return None if changed is None else (args, {**kwargs, key: changed})
        changed = _change(args[0], tap, width, act)
        return None if changed is None else ((changed, *args[1:]), kwargs)

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        whole = out[0] if isinstance(out, tuple) else out
        changed = _change(whole, tap, width, act)
        if changed is None:  # what was seen must stay as it was, and what follows may overwrite its input
            changed = whole.clone()
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    if tap.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@contextmanager
def _visible_products(module: nn.Module) -> Iterator[None]:
    """Keep fused experts on an implementation whose products show which expert they belong to.

    The batched implementation of transformers copies the experts' weights token by token, and generation may
    choose it after we were asked; so the choice is made at each call and undone after it.
    """
    config: Any = getattr(module, "config", None)
    if getattr(config, "_experts_implementation", None) is None:
        yield
        return
    before: list[str] = []

    def enter(*_: Any) -> None:
        chosen = config._experts_implementation
        before.append(chosen)
        if chosen not in ("eager", "grouped_mm"):
            config._experts_implementation = "grouped_mm"

    def leave(*_: Any) -> None:
        if before:
            config._experts_implementation = before.pop()

    first = module.register_forward_pre_hook(enter, prepend=True)
    last = module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


class _Products(TorchFunctionMode):
    """Intercepts the matrix products with given parameters, or with an expert's slice of them."""

    def __init__(self, model: nn.Module, taps: list[tuple[Tap, int, Act]]) -> None:
        super().__init__()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.taps: dict[int, list[tuple[Tap, int, Act, Tensor]]] = {}
        for tap, width, act in taps:
            p = parameters[tap.parameter]
            self.taps.setdefault(p.untyped_storage()._cdata, []).append((tap, width, act, p))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = _OPERANDS.get(getattr(func, "__name__", "").split(".")[0])
        if places is None or len(args) <= max(places):
            return func(*args, **kwargs)
        for w_at, x_at in (places, places[::-1]):
            w = args[w_at]
            if isinstance(w, Tensor) and w.untyped_storage()._cdata in self.taps:
                return self.product(func, list(args), kwargs, w, x_at)
        return func(*args, **kwargs)

    def product(self, func: Any, args: list[Any], kwargs: dict[str, Any], w: Tensor, x_at: int) -> Any:
        mine = [m for m in self.taps[w.untyped_storage()._cdata] if self.covers(m[0], m[3], w)]
        offs = kwargs.get("offs", args[2] if len(args) > 2 and w.dim() == 3 else None)
        ends = offs.tolist() if isinstance(offs, Tensor) and offs.dtype == torch.int32 else None
        for tap, width, act, _ in mine:
            if tap.side in ("argument", "input"):
                args[x_at] = self.part(args[x_at], w, ends, tap, width, act)
        out = func(*args, **kwargs)
        for tap, width, act, _ in mine:
            if tap.side in ("result", "output"):
                out = self.part(out, w, ends, tap, width, act)
        return out

    @staticmethod
    def covers(tap: Tap, p: Tensor, w: Tensor) -> bool:
        """Whether the weight of this product holds the tap's expert."""
        return w.dim() == 3 or tap.expert is None or w.storage_offset() - p.storage_offset() == tap.offset

    @staticmethod
    def part(x: Tensor, w: Tensor, ends: list[int] | None, tap: Tap, width: int, act: Act) -> Tensor:
        """Apply `act` to the tokens of the tap's expert."""
        if w.dim() != 3 or tap.expert is None or w.stride(0) == 0:
            changed = _change(x, tap, width, act) if x.numel() else None
            return x if changed is None else changed
        e = tap.expert
        rows = slice(ends[e - 1] if e else 0, ends[e]) if ends is not None else e
        if x[rows].numel() == 0:
            return x
        changed = _change(x[rows], tap, width, act)
        if changed is None:
            return x
        x = x.clone()
        x[rows] = changed
        return x
