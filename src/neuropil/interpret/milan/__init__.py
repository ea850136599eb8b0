"""MILAN."""

from neuropil.interpret.milan.exemplars import ExemplarSet, exemplars
from neuropil.interpret.milan.layer import UnknownLayer, tokens_to_grid

__all__ = ["ExemplarSet", "UnknownLayer", "exemplars", "tokens_to_grid"]
