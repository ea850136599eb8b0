"""The nested types of a system, as text.

>>> from neuropil.interpret.nested import Interface, Machine, Real
>>> cell = Machine(Interface(Real(), Real()), 0.0, lambda s: s, lambda s, d: d, "cell")
>>> print(tree(cell @ cell))
cell @ cell: (R x R) y^(R x R)
├─ 0: cell: R y^R
└─ 1: cell: R y^R
"""

from __future__ import annotations

from typing import Any


def tree(machine: Any) -> str:
    """One line a part: its name and type, indented by how deep it lies."""
    return "\n".join(_lines(machine, machine.name))


def _lines(part: Any, label: str) -> list[str]:
    lines = [f"{label}: {_type(part)}"]
    parts = list(getattr(part, "parts", {}).items())
    for number, (name, inner) in enumerate(parts):
        last = number == len(parts) - 1
        head, *rest = _lines(inner, name if name == inner.name else f"{name}: {inner.name}")
        lines.append(("└─ " if last else "├─ ") + head)
        lines += [("   " if last else "│  ") + line for line in rest]
    return lines


def _type(part: Any) -> str:
    return str(part.interface) if hasattr(part, "interface") else f"{part.source} -> {part.target}, constant"
