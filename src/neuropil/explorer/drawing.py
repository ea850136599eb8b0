"""The model's circuit diagram on its page: drawn anew at each depth, its layers linked to their neurons."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuropil.build import keep_diagram, kept_diagram
from neuropil.errors import NeuropilError
from neuropil.neurons import Site

DEPTHS = 4
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


@dataclass(frozen=True)
class Drawn:
    """A diagram as SVG without its style sheet, which the page's policy lets come from a file alone."""

    svg: str
    css: str


class Drawings:
    """The drawings of one atlas's model. The diagram is the atlas's own, else traced from the model and kept."""

    def __init__(self, path: Path, live: Any) -> None:
        self.path, self._live = path, live
        self._lock = threading.Lock()  # tracing runs the model
        self._diagram: Any = None
        self._made: dict[tuple[int, bool], Drawn] = {}

    def drawn(self, sites: Sequence[Site], fingerprint: str, depth: int, fold: bool) -> Drawn:
        """The drawing. Raises NeuropilError where there is neither a diagram in the atlas nor the model."""
        with self._lock:
            if self._diagram is None:
                self._diagram = kept_diagram(self.path, fingerprint) or self._traced()
            if (depth, fold) not in self._made:
                text = self._diagram.svg(depth=depth, fold=fold, palette="auto", href=linker(sites))
                css = "".join(_STYLE.findall(text))
                self._made[depth, fold] = Drawn(_STYLE.sub("", text), css)
            return self._made[depth, fold]

    def _traced(self) -> Any:
        model = self._live.light()
        if model is None:
            why = self._live.status.message
            raise NeuropilError(f"the diagram is drawn from the model, and that is not to be had: {why}")
        return keep_diagram(model, self.path)


def linker(sites: Sequence[Site]) -> Callable[[str], str | None]:
    """For a module's name the address of the table of its neurons: of those whose weights lie in it.

    >>> from torch import nn
    >>> from neuropil.neurons import find_sites
    >>> net = nn.Sequential(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> link = linker(find_sites(net))
    >>> link("0"), link("0.0"), link("1"), link("3")
    ('/?site=0', '/?site=0', '/?site=1', None)
    """
    owners = [(site.number, {w.name.rpartition(".")[0] for w in site.reads.values()}) for site in sites]

    def link(module: str) -> str | None:
        name = module.partition("@")[0]  # a module that runs again is numbered
        inside = f"{name}."
        found = [n for n, names in owners if name and any(o == name or o.startswith(inside) for o in names)]
        if not found:
            return None
        low, high = min(found), max(found)
        return f"/?site={low}" if low == high else f"/?site={low}-{high}"

    return link
