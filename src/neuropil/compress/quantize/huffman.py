"""Huffman coding of codes: how many bits a stream of symbols takes, and the bytes themselves.

>>> symbols = torch.tensor([0, 0, 0, 0, 1, 2, 0, 0])
>>> lengths = huffman_lengths(torch.bincount(symbols))
>>> lengths.tolist(), huffman_bits(symbols)
([1, 2, 2], 10)
>>> huffman_decode(huffman_encode(symbols, lengths), len(symbols), lengths).tolist()
[0, 0, 0, 0, 1, 2, 0, 0]
"""

from __future__ import annotations

import heapq
import itertools

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from neuropil.compress.quantize.tiles import QuantizationError


def huffman_lengths(counts: Integer[Tensor, " symbols"]) -> Integer[Tensor, " symbols"]:
    """The length of each symbol's code; 0 for symbols that do not occur, 1 for one that is alone."""
    lengths = torch.zeros_like(counts)
    order = itertools.count()
    heap = [(n, next(order), [symbol]) for symbol, n in enumerate(counts.tolist()) if n]
    if len(heap) == 1:
        lengths[heap[0][2][0]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (a + b, next(order), left + right))
    return lengths


def huffman_bits(symbols: Integer[Tensor, "*shape"]) -> int:
    """How many bits a stream of symbols takes, without its table."""
    counts = torch.bincount(symbols.flatten()) if symbols.numel() else torch.zeros(1, dtype=torch.int64)
    return int((counts * huffman_lengths(counts)).sum())


def _canonical(lengths: Tensor) -> dict[int, int]:
    """The code of each symbol: in order of length, then of symbol, so that lengths alone tell them."""
    codes, code, before = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths.tolist()) if length):
        code <<= length - before
        codes[symbol], before = code, length
        code += 1
    return codes


def huffman_encode(symbols: Integer[Tensor, " n"], lengths: Integer[Tensor, " symbols"]) -> UInt8[Tensor, " bytes"]:
    """The stream as bytes, the first bit of a code first. Raises QuantizationError for a symbol that has no code."""
    codes = _canonical(lengths)
    if symbols.numel() and (int(symbols.max()) >= len(lengths) or not bool((lengths[symbols.long()] > 0).all())):
        raise QuantizationError("a symbol without a code: make the lengths from counts of the same symbols")
    width = max(1, int(lengths.max()))
    table = torch.zeros(len(lengths), width, dtype=torch.uint8)
    for symbol, code in codes.items():
        length = int(lengths[symbol])
        table[symbol, :length] = torch.tensor([code >> (length - 1 - i) & 1 for i in range(length)], dtype=torch.uint8)
    used = torch.arange(width) < lengths[:, None]
    bits = table[symbols.long()][used[symbols.long()]]
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1).to(torch.uint8)


def huffman_decode(
    stored: UInt8[Tensor, " bytes"], count: int, lengths: Integer[Tensor, " symbols"]
) -> Integer[Tensor, " count"]:
    """The first `count` symbols of a stream. Raises QuantizationError where it is too short."""
    by_code = {(int(lengths[symbol]), code): symbol for symbol, code in _canonical(lengths).items()}
    bits = ((stored[:, None].int() >> torch.arange(7, -1, -1)) & 1).flatten().tolist()
    found: list[int] = []
    length = code = 0
    for bit in bits:
        if len(found) == count:
            break
        length, code = length + 1, 2 * code + bit
        if (symbol := by_code.get((length, code))) is not None:
            found.append(symbol)
            length = code = 0
    if len(found) < count:
        raise QuantizationError(f"the stream ends after {len(found)} of {count} symbols")
    return torch.tensor(found, dtype=torch.int64)
