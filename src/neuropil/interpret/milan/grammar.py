"""The words for the generated scenes: what an annotator would say of regions that share attributes, and back.

>>> say({"red", "striped", "circle"}, random.Random(3))
'circles that are striped and red'
>>> sorted(mentioned("a little banded red disc"))
['circle', 'red', 'small', 'striped']
"""

from __future__ import annotations

import random
from collections.abc import Iterable

from neuropil.interpret.milan.language import tokens

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
TEXTURES = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left", "right")
TEXT = "text"
KINDS = (COLOURS, TEXTURES, SHAPES, SIZES)
ATTRIBUTES = (*COLOURS, *TEXTURES, *SHAPES, *SIZES, TEXT)

_SAID: dict[str, tuple[str, ...]] = {
    **{colour: (colour,) for colour in COLOURS},
    "plain": ("plain", "solid"), "striped": ("striped", "banded"), "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"), "small": ("small", "little"), "large": ("large", "big"),
}  # fmt: skip
_NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "circle": (("circle", "circles"), ("disc", "discs")),
    "square": (("square", "squares"), ("box", "boxes")),
    "triangle": (("triangle", "triangles"),),
    "cross": (("cross", "crosses"), ("plus", "pluses")),
}
_ANY = (("shape", "shapes"), ("object", "objects"), ("thing", "things"))
_TEXTS = ("text in a corner", "printed letters", "a word in a corner", "letters of a word", "small text")
_NOTHING = ("various objects", "different shapes", "objects and background", "many things")
_PLACES = {"above": "above", "below": "below", "left": "left of", "right": "right of"}
_BACK = {
    **{word: attribute for attribute, words in _SAID.items() for word in words},
    **{word: shape for shape, nouns in _NOUNS.items() for pair in nouns for word in pair},
    **dict.fromkeys(("text", "letter", "letters", "word", "words"), TEXT),
}


def say(attributes: Iterable[str], draw: random.Random) -> str:
    """A description of regions that have these attributes in common."""
    has = set(attributes)
    if TEXT in has:
        return draw.choice(_TEXTS)
    if not has:
        return draw.choice(_NOTHING)
    shape = next((s for s in SHAPES if s in has), None)
    one, many = draw.choice(_NOUNS[shape] if shape else _ANY)
    words = [draw.choice(_SAID[a]) for kind in (SIZES, TEXTURES, COLOURS) for a in kind if a in has]
    end = next((f" {_PLACES[r]} another {draw.choice(_ANY)[0]}" for r in RELATIONS if r in has), "")
    form = draw.randrange(3)
    if form == 0:
        said = " ".join(["a", *words, one])
    elif form == 1 or not words:
        said = " ".join([*words, many])
    else:
        said = f"{many} that are {' and '.join(words)}"
    return said + end


def mentioned(description: str) -> set[str]:
    """The attributes that a description names."""
    found = {_BACK[word] for word in tokens(description) if word in _BACK}
    return found - {"small"} if TEXT in found else found


def f1(found: set[str], truth: set[str]) -> float:
    """The harmonic mean of precision and recall; zero where nothing is right.

    >>> f1({"red"}, {"red", "circle"})
    0.6666666666666666
    """
    right = len(found & truth)
    return 2 * right / (len(found) + len(truth)) if right else 0.0
