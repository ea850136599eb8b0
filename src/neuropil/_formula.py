"""The nonlinearity of a layer of neurons, cut out of a trace so that it can be applied again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuropil._streams import Parameter, Ref, Step, Unknown, flat
from neuropil._trace import Trace


@dataclass(frozen=True)
class Formula:
    """The nonlinearity between a site's projections and its activation, as the model's own operations.

    Views are left out, so that it applies to projections of any leading shape; slices of a fused projection are
    replaced by the role they pick.
    """

    steps: dict[int, Step | int]
    root: int
    leaves: dict[int, str]  # node -> role
    slices: dict[str, tuple[int, int, int, int]]  # role -> (outputs of the map, start, step, width)
    convolutions: dict[str, tuple[Any, ...]]  # role -> settings of its convolution
    weights: dict[str, int]  # role -> node of a weight that is computed from its parameter
    paddings: dict[str, tuple[int, ...]]  # role -> padding of its input inside the module
    complete: bool = True  # False where the probe could not see a constant's value
    scaled: bool = False  # h is, token by token, a multiple of what this gives (a routing weight)
    prefix: str = ""

    @classmethod
    def of(cls, seen: Trace, root: int, roles: dict[str, tuple[int, int, int, int]]) -> Formula:
        """Cut the steps that lead from the projections of `roles` to `root` out of a trace."""
        leaves: dict[int, str] = {}
        steps: dict[int, Step | int] = {}
        sources = {seen.op_nodes[op] for op, *_ in roles.values()}
        wanted = [root]
        while wanted:
            node = wanted.pop()
            if node in steps or node in leaves:
                continue
            role = cls._role(seen, node, roles)
            if role is not None:
                leaves[node] = role
            if node in seen.steps and node not in sources:
                step = seen.steps[node]
                steps[node] = step
                wanted += [step] if isinstance(step, int) else _references(step)
        slices = {r: (seen.ops[op].out_features, start, by, width) for r, (op, start, by, width) in roles.items()}
        settings = {r: seen.ops[op].settings for r, (op, *_) in roles.items() if seen.ops[op].kind == "conv"}
        weights = {r: seen.ops[op].weight_node for r, (op, *_) in roles.items() if seen.ops[op].weight_node >= 0}
        scaled = bool(seen.scaled & set(steps))
        steps |= cls._closure(seen, list(weights.values()))
        paddings = {r: seen.ops[op].padding for r, (op, *_) in roles.items() if seen.ops[op].padding}
        known = [s for s in steps.values() if isinstance(s, Step)]
        complete = not any(isinstance(a, Unknown) for s in known for a in flat((s.args, s.kwargs)))
        return cls(steps, root, leaves, slices, settings, weights, paddings, complete, scaled)

    @staticmethod
    def _closure(seen: Trace, wanted: list[int]) -> dict[int, Step | int]:
        steps: dict[int, Step | int] = {}
        while wanted:
            node = wanted.pop()
            if node not in steps and node in seen.steps:
                step = steps[node] = seen.steps[node]
                wanted += [step] if isinstance(step, int) else _references(step)
        return steps

    @staticmethod
    def _role(seen: Trace, node: int, roles: dict[str, tuple[int, int, int, int]]) -> str | None:
        """The role whose slice this node is, if it is one stream of exactly that slice."""
        value = seen.by_node.get(node)
        if value is None or len(value.streams) != 1:
            return None
        stream = value.streams[0]
        for role, (op, start, _, width) in roles.items():
            if stream.op == op and int(stream.index.min()) == start and stream.index.unique().numel() == width:
                return role
        return None

    def moved(self, name: str) -> Formula:
        """The same formula for a module that lies at `name` in the model."""
        return replace(self, prefix=f"{name}.{self.prefix}")

    def weight(self, role: str, tensor: Any) -> Tensor | None:
        """The weight of a role where it is computed from its parameter, in the parameter's shape."""
        if role not in self.weights:
            return None
        return self._run(self.weights[role], {}, tensor)

    def __call__(self, projections: dict[str, Tensor], tensor: Any) -> Tensor:
        """The activation for projections `[..., width]`; `tensor(name)` gives a parameter or buffer."""
        return self._run(self.root, projections, tensor)

    def _run(self, root: int, projections: dict[str, Tensor], tensor: Any) -> Tensor:
        done: dict[tuple[int, str | None], Any] = {}

        def run(node: int, role: str | None) -> Any:
            role = self.leaves.get(node, role)
            if (node, role) not in done:
                done[node, role] = compute(node, role)
            return done[node, role]

        def compute(node: int, role: str | None) -> Any:
            if node not in self.steps:
                if role is None:
                    raise KeyError(f"node {node} of the formula is no projection of the site")
                return projections[role]
            step = self.steps[node]
            if isinstance(step, int):
                return run(step, role)

            def resolve(a: Any) -> Any:
                if isinstance(a, Ref):
                    return run(a.node, role)
                if isinstance(a, Parameter):
                    whole = own(tensor(self.prefix + a.name), role)
                    return whole.reshape(a.shape) if a.shape and role is None else whole
                if isinstance(a, list | tuple):
                    return type(a)(resolve(b) for b in a)
                return a

            kwargs = {k: resolve(v) for k, v in step.kwargs.items()}
            if kwargs.get("device") is not None:
                kwargs["device"] = next((x.device for x in projections.values()), torch.device("cpu"))
            args = resolve(step.args)
            if step.func is torch.ops.aten.native_group_norm.default:  # takes the sizes of its input as numbers
                sizes = args[0].shape
                args = (*args[:3], sizes[0], sizes[1], sizes[2:].numel(), *args[6:])
            shape = args[0].shape if step.rank == 2 and isinstance(args[0], Tensor) else None
            if shape is not None:
                args = (args[0].flatten(0, -2), *args[1:])
            out = step.func(*args, **kwargs)
            out = out[0] if isinstance(out, list | tuple) else out
            return out if shape is None else out.reshape(shape)

        def own(p: Tensor, role: str | None) -> Tensor:
            if role is None or p.dim() == 0:
                return p
            outputs, start, by, width = self.slices[role]
            fused = outputs != width and p.shape[-1] == outputs
            return p[..., start : start + by * (width - 1) + 1 : by] if fused else p

        return run(root, None)


def _references(step: Step) -> list[int]:
    return [r.node for r in flat((step.args, step.kwargs)) if isinstance(r, Ref)]
