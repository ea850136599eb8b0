"""How much faster does a model generate with the core neurons of its prompt only, and at what cost?

    python benchmarks/coreinfer.py [--threads N] [--tokens N] [--rounds R] [--processor-time] [--json FILE]

SmolLM2 (fp32) goes on with prompts of 256 tokens from the Brown corpus. In one run, in turn so that a drift of the
machine meets all alike: the dense model; CoreInfer at several shares of kept neurons (the bar: 1.3 times the dense
rate at 0.4); and the peer that needs no fixed set, a threshold for each token (TEAL, CATS), at the same share. Without
a kernel of its own that one computes gate and up in full, then gathers the columns of the down-projection that the
token's largest activations need.

Rates are of the median token. Beside them stands what the neurons left out cost: the rise of the mean surprise of
the 128 tokens that really follow, and the factor of perplexity that it is. The limit is what the weights that are
read allow: decoding a single sequence is bound by memory. On a machine that does other work too, `--threads 1
--processor-time` measures by the processor's time, which is the same where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.compress import CoreInfer
from neuropil.data import text
from neuropil.evaluate import surprise
from neuropil.models import load
from neuropil.neurons import find_sites

PROMPT, REST = 256, 128
LAYERS = slice(2, 29)


@contextmanager
def per_token(model: Any, keep: float, layers: slice) -> Iterator[None]:
    """Of each token's activations the largest share alone reaches the down-projection (passes of one token)."""
    with ExitStack() as stack:
        for site in find_sites(model)[layers]:
            down = model.get_submodule(site.tap.module)
            own = down.forward
            columns = down.weight.detach().t().contiguous()
            down.forward = partial(_gathered, own, columns, int(keep * site.width))
            stack.callback(delattr, down, "forward")
        yield


def _gathered(own: Any, columns: Tensor, kept: int, h: Tensor) -> Tensor:
    if h.shape[:-1].numel() > 1:
        out: Tensor = own(h)
        return out
    value = h.flatten()
    which = value.abs().topk(kept).indices
    return (value[which] @ columns.index_select(0, which)).view(*h.shape[:-1], -1)


def step_seconds(model: Any, ids: Tensor, tokens: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each greedy step after the prompt."""
    out = model(ids, use_cache=True)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    seconds = []
    for _ in range(tokens):
        start = clock()
        out = model(last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
        seconds.append(clock() - start)
    return seconds


def nll(model: Any, ids: Tensor, one_by_one: bool) -> float:
    """Mean surprise of the tokens that follow the prompt, read with its cache."""
    out = model(ids[:, :PROMPT], use_cache=True)
    logits, cache = [out.logits[0, -1:]], out.past_key_values
    rest = ids[:, PROMPT:-1]
    pieces = rest.split(1, dim=1) if one_by_one else [rest]
    logits += [model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces]
    return float(surprise(torch.cat(logits), ids[0, PROMPT:]).mean())


def weights_read(model: nn.Module, keep: float, layers: slice, parts: int = 3) -> float:
    """Numbers read for a token, `parts` of the three MLP matrices at a share."""
    whole = sum(p.numel() for p in model.parameters())
    width = sum(site.width for site in find_sites(model)[layers])
    return whole - parts * (1 - keep) * width * model.config.hidden_size  # type: ignore[union-attr,operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--processor-time", action="store_true", help="instead of wall time; one thread only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time adds up the threads; give --threads 1")
    clock = time.process_time if args.processor_time else time.perf_counter
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    loaded = load("smollm2")
    model: Any = loaded.module()
    documents = text("brown").documents
    chosen = documents[:: len(documents) // args.texts][: args.texts]
    ids = [loaded.tokenizer(d, return_tensors="pt")["input_ids"][:, : PROMPT + REST] for d in chosen]
    ways: dict[str, tuple[Any, float, bool]] = {
        "dense": (nullcontext, 1.0, False),
        "CoreInfer 0.4": (lambda: CoreInfer(model, 0.4, layers=LAYERS), weights_read(model, 0.4, LAYERS), False),
        "CoreInfer 0.6": (lambda: CoreInfer(model, 0.6, layers=LAYERS), weights_read(model, 0.6, LAYERS), False),
        "CoreInfer 0.8": (lambda: CoreInfer(model, 0.8, layers=LAYERS), weights_read(model, 0.8, LAYERS), False),
        "CoreInfer 0.4, refresh 16": (
            lambda: CoreInfer(model, 0.4, layers=LAYERS, refresh_every=16),
            weights_read(model, 0.4, LAYERS),
            True,
        ),
        "per-token threshold 0.4": (lambda: per_token(model, 0.4, LAYERS), weights_read(model, 0.4, LAYERS, 1), True),
    }
    whole = sum(p.numel() for p in model.parameters())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(args.rounds):
        for name, (way, _, _) in ways.items():
            with way():
                seconds[name] += step_seconds(model, ids[turn % len(ids)][:, :PROMPT], args.tokens, clock)
    costs: dict[str, float] = {}
    for name, (way, _, one_by_one) in ways.items():
        with way():
            costs[name] = statistics.fmean(nll(model, row, one_by_one) for row in ids)
    print(f"SmolLM2, fp32, {args.threads} threads, {clock.__name__}, layers {LAYERS.start} to {LAYERS.stop - 1} sparse")
    print(f"{'':28}{'tokens/s':>9}{'x dense':>9}{'limit':>7}{'nats more':>11}{'x perplexity':>14}")
    rows = {}
    for name, (_, read, _) in ways.items():
        rate = 1 / statistics.median(seconds[name])
        ratio = rate * statistics.median(seconds["dense"])
        limit = 1.0 if name == "dense" else whole / read
        more = costs[name] - costs["dense"]
        rows[name] = {"rate": rate, "ratio": ratio, "limit": limit, "nats": more}
        print(f"{name:28}{rate:9.1f}{ratio:9.2f}{limit:7.2f}{more:11.3f}{math.exp(more):14.2f}")
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
