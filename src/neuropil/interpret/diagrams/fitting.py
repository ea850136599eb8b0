"""Whether arrays fit where they are put, and what the sizes left open become where they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neuropil.interpret.diagrams.axes import Arrays, Axis, DiagramError, same_size, symbol, written


def check_fit(found: Arrays, wanted: Arrays, who: str) -> None:
    """DiagramError naming the first place where two tuples of arrays differ."""
    if found == wanted:
        return
    if len(found) != len(wanted):
        raise DiagramError(
            f"{len(found)} arrays ({written(found)}) for {who}, which takes {len(wanted)} ({written(wanted)})"
        )
    for number, (have, want) in enumerate(zip(found, wanted, strict=True), 1):
        where = f"array {number} of {who}"
        if len(have.axes) != len(want.axes):
            raise DiagramError(f"{where}: given {str(have)!r} with {len(have.axes)} axes, expected {str(want)!r}")
        if have.dtype != want.dtype:
            raise DiagramError(f"{where}: given an array of {have.dtype}, expected one of {want.dtype}")
        for a, b in zip(have.axes, want.axes, strict=True):
            if a.name != b.name:
                raise DiagramError(
                    f"{where}: given axis {a.name!r} of size {a.size} where axis {b.name!r} of size {b.size} "
                    f"is expected ({str(have)!r} for {str(want)!r}); rename or transpose"
                )
            if not same_size(a.size, b.size):
                raise DiagramError(f"{where}: axis {a.name!r} of size {a.size} given, of size {b.size} expected")


def bindings(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[Any, Any]:
    """What the free sizes of both become when they share axes; DiagramError where sizes clash."""
    out: dict[Any, Any] = {}
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if a == b:
            continue
        if Axis(name, a).free:
            out[symbol(name)] = b
        elif Axis(name, b).free:
            out[symbol(name)] = a
        elif not same_size(a, b):
            raise DiagramError(
                f"axis {name!r} has size {a} on the left and axis {name!r} has size {b} on the right; "
                f"give one another name, or both the same size"
            )
    return dict(sorted(out.items(), key=lambda pair: str(pair[0])))
