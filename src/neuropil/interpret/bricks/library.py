"""A repository of customised bricks: find by key, attach, merge, keep on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.interpret.bricks.activity import Example, call, chosen_sites, tensors
from neuropil.interpret.bricks.custom import CustomBrick, fingerprint, load_brick
from neuropil.interpret.bricks.merging import merge_bricks
from neuropil.neurons import capture_inputs


@torch.no_grad()
def embedding(model: nn.Module, example: Example) -> Float[Tensor, "sequences d"]:
    """A key or a query: what the neurons of the last layer read, averaged over the places of each sequence."""
    sites, _ = chosen_sites(model)
    with capture_inputs(model, sites[-1:]) as read:
        call(model, example)
    x = next(iter(read[sites[-1].name].values()))
    return x.reshape(tensors(example)[0].shape[0], -1, x.shape[-1]).mean(1)


class BrickLibrary:
    """Bricks of one base model, by name.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> from neuropil.interpret.bricks import LoraBrick
    >>> library = BrickLibrary(net)
    >>> for name, key in (("north", [1.0, 0.0]), ("east", [0.0, 1.0])):
    ...     library.add(LoraBrick.new(name, net, ["0"], key=torch.tensor(key)))
    >>> library.retrieve(torch.tensor([0.9, 0.2]))
    ['north']
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.base = "" if model is None else fingerprint(model)
        self.bricks: dict[str, CustomBrick] = {}

    def __len__(self) -> int:
        return len(self.bricks)

    def __getitem__(self, name: str) -> CustomBrick:
        if name not in self.bricks:
            raise KeyError(f"no brick is called {name!r}; there are {', '.join(self.bricks) or 'none'}")
        return self.bricks[name]

    def add(self, brick: CustomBrick) -> None:
        """Keep a brick; a later version replaces an earlier one of its name and owner.

        Raises ModelError for a brick of another base model, ValueError for a name that another owner has.
        """
        if self.base and brick.base and brick.base != self.base:
            raise ModelError(f"brick {brick.name!r} was made for the model {brick.base}, these are for {self.base}")
        there = self.bricks.get(brick.name)
        if there is not None and there.owner != brick.owner:
            raise ValueError(f"{there.owner or 'nobody'} owns a brick called {brick.name!r}; give it another name")
        self.bricks[brick.name] = brick

    def retrieve(self, query: Float[Tensor, " d"], k: int = 1) -> list[str]:
        """Names of the k bricks whose keys are nearest to a query by cosine. Raises ValueError where none has a key."""
        keyed = {name: brick.key for name, brick in self.bricks.items() if isinstance(brick.key, Tensor)}
        if not keyed:
            raise ValueError("no brick here has a key; give one with key=...")
        keys = torch.stack([key.to(query) for key in keyed.values()])
        near = nn.functional.cosine_similarity(keys, query[None], dim=1)
        return [list(keyed)[i] for i in near.argsort(descending=True, stable=True)[:k].tolist()]

    @contextmanager
    def active(self, model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
        """Within the block these bricks act in the model, in this order."""
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self[name].attach(model))
            yield model

    def merge(self, names: Sequence[str], weights: Sequence[float] | None = None, **settings: Any) -> CustomBrick:
        """One brick in place of some, added under its name; see `merge_bricks`."""
        made = merge_bricks([self[name] for name in names], weights, **settings)
        self.add(made)
        return made

    def save(self, folder: str | Path) -> list[Path]:
        """Write every brick as a file of its own."""
        names = {name: "".join(c if c.isalnum() or c in "-_+." else "_" for c in name) for name in self.bricks}
        if len(set(names.values())) < len(names):
            raise ValueError(f"two bricks would get one file name: {sorted(names.values())}; rename one")
        return [brick.save(Path(folder) / f"{names[name]}.safetensors") for name, brick in self.bricks.items()]

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module | None = None) -> BrickLibrary:
        """The bricks of a folder, for a model if one is given (then those of another base are refused)."""
        library = cls(model)
        for path in sorted(Path(folder).glob("*.safetensors")):
            library.add(load_brick(path))
        return library
