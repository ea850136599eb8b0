"""The readable text of every token of a vocabulary, with the leading space that `decode` often drops."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BLANK = "\u2581"  # sentencepiece writes a space so
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # and a byte that no token covers so


@cache
def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves; the others were numbered, in order, from U+0100 on.

    >>> byte_of()["Ġ"], byte_of()["A"]
    (32, 65)
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in set(plain)]
    table.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return table


def texts(tokenizer: Any) -> list[str]:
    """The text of ids 0, 1, ... up to the tokenizer's greatest; "" for an id that has none.

    A token that is not whole UTF-8 shows the replacement character for the bytes that stand alone.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    literal = {str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})}
    spelling = _spelling(vocabulary)
    table = byte_of()
    result = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        text = token
        if token not in literal:
            if spelling == "bytes" and all(character in table for character in token):
                text = bytes([table[character] for character in token]).decode("utf-8", errors="replace")
            elif spelling == "blanks":
                byte = _BYTE.fullmatch(token)
                text = bytes.fromhex(byte[1]).decode("utf-8", "replace") if byte else token.replace(_BLANK, " ")
        result[number] = text
    return result


def _spelling(vocabulary: dict[str, int]) -> str:
    """How this vocabulary spells its tokens, told from the spellings: "bytes", "blanks" or "plain"."""
    spaced = sum(token.startswith("Ġ") for token in vocabulary)
    blank = sum(token.startswith(_BLANK) for token in vocabulary)
    if blank > spaced:
        return "blanks"
    return "bytes" if spaced and all(byte in vocabulary for byte in list(byte_of())[:64]) else "plain"
