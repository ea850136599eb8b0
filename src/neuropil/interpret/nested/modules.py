"""Machines as torch modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from neuropil.interpret.nested.machines import Machine, stack, steps


class _Held(nn.Module):
    """A state as parameters (weights of wires) and buffers (the rest)."""

    def __init__(self, machine: Machine, state: Any) -> None:
        super().__init__()
        self.machine = machine
        leaves, self._spec = tree_flatten(state)
        learns = tree_flatten(machine.weights(state))[0]
        self._plain: dict[int, Any] = {}
        for number, (leaf, learn) in enumerate(zip(leaves, learns, strict=True)):
            if not isinstance(leaf, Tensor):
                self._plain[number] = leaf
            elif learn:
                self.register_parameter(f"state{number}", nn.Parameter(leaf.detach().clone()))
            else:
                self.register_buffer(f"state{number}", leaf.detach().clone())
        self._count = len(leaves)

    @property
    def state(self) -> Any:
        """The state put together again."""
        leaves = [self._plain[n] if n in self._plain else getattr(self, f"state{n}") for n in range(self._count)]
        return tree_unflatten(leaves, self._spec)


class Implement(_Held):
    """What an organisation makes of what is inside: `get`, with its weights as parameters."""

    def forward(self, inside: Any) -> Any:
        return self.machine.get(self.state, inside)  # type: ignore[attr-defined]


class Recurrent(_Held):
    """A machine over time: inputs with time first -> (outputs with time first, last state), as `nn.RNN` has it.

    It starts from its own state unless one is given. Gradients flow through time, to the weights of wires as well.
    """

    def forward(self, inputs: Any, state: Any = None) -> tuple[Any, Any]:
        state = self.state if state is None else state
        shown = []
        for given in steps(inputs, self.machine.interface):
            out, close = self.machine.open(state)
            state = close(given)
            shown.append(out)
        return stack(shown), state
