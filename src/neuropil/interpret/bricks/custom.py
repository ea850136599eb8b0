r"""Customised bricks: what is added to a model after its training, and can be taken away again.

    LoraBrick     y = W x + c B A x                       a low-rank change of a linear map; of rank one, an edit
    AdapterBrick  y = m(x) + U max(D m(x), 0)             a bottleneck after any module m

A brick is a small `nn.Module` that is attached to a model by hooks and detached again, after which the model answers as
before, to the bit. It carries what a repository needs to know of it: a name, an owner, a version, a key by which it is
found, and the fingerprint of the model it was made for, which `attach` checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.models import load

FORMAT = "neuropil.brick"
SEPARATOR = "|"


class CustomBrick(nn.Module):
    """Parameters by the name of the module they act on, and what is known of them; see `LoraBrick`, `AdapterBrick`."""

    kind: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Mapping[str, Tensor]],
        *,
        key: Float[Tensor, " d"] | None = None,
        owner: str = "",
        version: str = "1",
        base: str = "",
    ) -> None:
        super().__init__()
        if not tensors or any(set(each) != set(self.parts) for each in tensors.values()):
            raise ValueError(f"brick {name!r}: expected {', '.join(self.parts)} for each of one or more modules")
        self.name, self.owner, self.version, self.base = name, owner, version, base
        self.targets = tuple(tensors)
        self.weights = nn.ParameterDict(
            {
                f"{target}{SEPARATOR}{part}".replace(".", "/"): nn.Parameter(each[part].clone())
                for target, each in tensors.items()
                for part in self.parts
            }
        )
        self.register_buffer("key", key)
        self._hooks: list[Any] = []

    def part(self, target: str, part: str) -> Tensor:
        """One tensor of what acts on a module."""
        return self.weights[f"{target}{SEPARATOR}{part}".replace(".", "/")]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The parameters by module and part, detached."""
        return {target: {part: self.part(target, part).detach() for part in self.parts} for target in self.targets}

    def _added(self, target: str, x: Tensor, out: Tensor) -> Tensor:
        raise NotImplementedError

    def _check(self, module: nn.Module, target: str) -> None:
        """Raise ValueError where the tensors do not fit the module; nothing to check by default."""

    @property
    def attached(self) -> bool:
        return bool(self._hooks)

    def attach(self, model: nn.Module, *, check: bool = True) -> CustomBrick:
        """Let it act in the model, until `detach`. The model's own parameters stay as they are.

        Raises ModelError where the model is not the one it was made for (unless `check=False`), or has no such module;
        ValueError where it is attached already.
        """
        if self.attached:
            raise ValueError(f"brick {self.name!r} is attached; detach it first")
        if check and self.base and (found := fingerprint(model)) != self.base:
            raise ModelError(
                f"brick {self.name!r} was made for the model {self.base}, this is {found}; use that model, or "
                "attach(check=False) if you know that it fits"
            )
        modules = dict(model.named_modules())
        if missing := [target for target in self.targets if target not in modules]:
            raise ModelError(f"brick {self.name!r} acts on {missing[0]!r}, which this model has not")
        for target in self.targets:
            self._check(modules[target], target)
        for target in self.targets:
            self._hooks.append(modules[target].register_forward_hook(self._hook(target)))
        return self

    def _hook(self, target: str) -> Any:
        return lambda _, args, out: out + self._added(target, args[0], out)

    def detach(self) -> None:
        """Take it out of the model it is attached to."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> CustomBrick:
        return self

    def __exit__(self, *_: Any) -> None:
        self.detach()

    # --- files ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file with its facts in the header, whole or not at all."""
        facts = {"kind": self.kind, "name": self.name, "owner": self.owner, "version": self.version, "base": self.base}
        tensors = {f"{t}{SEPARATOR}{p}": x.contiguous() for t, each in self.tensors().items() for p, x in each.items()}
        if isinstance(self.key, Tensor):
            tensors["key"] = self.key
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.tmp")
        save_file(tensors, part, metadata={FORMAT: json.dumps(facts)})
        part.replace(target)
        return target


class LoraBrick(CustomBrick):
    """y = W x + c B A x: A `[rank, in]` ("down"), B `[out, rank]` ("up"); c, the scale, is multiplied into B.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> brick = LoraBrick.new("task", net, ["0"], rank=2)
    >>> x = torch.randn(3, 4); before = net(x)
    >>> with brick.attach(net):
    ...     torch.equal(net(x), before)                              # B begins at zero
    True
    """

    kind, parts = "lora", ("down", "up")

    @classmethod
    def new(
        cls, name: str, model: nn.Module, targets: Iterable[str], rank: int = 8, *, seed: int = 0, **facts: Any
    ) -> LoraBrick:
        """One that changes nothing yet: A random, B zero. `targets` are linear maps of the model."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for target in targets:
            outputs, inputs = _shape(model.get_submodule(target), target)
            down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            tensors[target] = {"down": down, "up": torch.zeros(outputs, rank)}
        return cls(name, tensors, **{"base": fingerprint(model), **facts})

    def _added(self, target: str, x: Tensor, out: Tensor) -> Tensor:
        down, up = self.part(target, "down").to(x), self.part(target, "up").to(x)
        return nn.functional.linear(nn.functional.linear(x, down), up)

    def _check(self, module: nn.Module, target: str) -> None:
        wanted = self.part(target, "up").shape[0], self.part(target, "down").shape[1]
        if (found := _shape(module, target)) != wanted:
            raise ValueError(f"brick {self.name!r}: {target!r} maps {found[1]} to {found[0]}, not {wanted[::-1]}")

    def change(self, target: str) -> Float[Tensor, "out in"]:
        """The matrix B A that it adds to the weight of a module."""
        return self.part(target, "up").detach() @ self.part(target, "down").detach()


class AdapterBrick(CustomBrick):
    """y = m(x) + U max(D m(x), 0): D `[rank, d]` ("down"), U `[d, rank]` ("up"), after a module of output width d."""

    kind, parts = "adapter", ("down", "up")

    @classmethod
    def new(
        cls, name: str, model: nn.Module, widths: Mapping[str, int], rank: int = 8, *, seed: int = 0, **facts: Any
    ) -> AdapterBrick:
        """One that changes nothing yet (U zero), after modules of these output widths."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            target: {"down": torch.randn(rank, d, generator=generator) / d**0.5, "up": torch.zeros(d, rank)}
            for target, d in widths.items()
        }
        return cls(name, tensors, **{"base": fingerprint(model), **facts})

    def _added(self, target: str, x: Tensor, out: Tensor) -> Tensor:
        down, up = self.part(target, "down").to(out), self.part(target, "up").to(out)
        return nn.functional.linear(nn.functional.linear(out, down).relu(), up)


KINDS: dict[str, type[CustomBrick]] = {kind.kind: kind for kind in (LoraBrick, AdapterBrick)}


def fingerprint(model: nn.Module) -> str:
    """The hash of a model's weights and settings by which a brick knows its base (`Model.fingerprint`)."""
    return load(model).fingerprint


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Outputs and inputs of a linear map, whichever way its weight lies. Raises ValueError for another module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        raise ValueError(f"{name!r} is a {type(module).__name__}, expected a linear map")
    out, inputs = weight.shape[::-1] if type(module).__name__ == "Conv1D" else weight.shape
    return int(out), int(inputs)


def load_brick(path: str | Path) -> CustomBrick:
    """A brick from its file. Raises ModelError for a file that holds none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})[FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} holds no brick ({error}); write it with CustomBrick.save") from error
    except Exception as error:  # safetensors has its own class, which is not exported everywhere
        raise ModelError(f"{path} is damaged ({error}); write it again") from error
    key = tensors.pop("key", None)
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        target, _, part = name.rpartition(SEPARATOR)
        found.setdefault(target, {})[part] = value
    kind = KINDS[facts.pop("kind")]
    return kind(facts.pop("name"), found, key=key, **facts)
