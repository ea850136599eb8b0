"""How fast are the layer-normed networks? Ours, a naive loop and torch's own networks, side by side in one run.

    python benchmarks/layer_norm.py [--sizes TIMES,BATCH,INPUTS,UNITS ...] [--repeats R] [--compile] [--json FILE]

For each of RNN, GRU and LSTM, medians of interleaved runs on the same sequence, forward alone and with the backward
pass, and two ratios:

1. naive / ours: the naive loop calls the cell at every time with the input of that time, so that the input's
   products and norms are done time by time; ours does them once for all times (the bar: above 1). The gain is
   largest where the steps are small, and none where the input's part of all times no longer fits the cache;
2. ours / torch: torch's network without norms, one kernel for the whole sequence on a CPU. It is the limit: the
   norms add work to every step, and ours is a loop in Python.

Last, `LayerNorm` over the same norm written with torch's elementary operations, and over `torch.nn.LayerNorm`.
With --compile the LSTM is also compiled whole, which unrolls its loop: about a minute for 28 times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from neuropil.layers.layer_norm import LayerNorm, LayerNormGRU, LayerNormLSTM, LayerNormRNN

PAIRS = {"RNN": (LayerNormRNN, nn.RNN), "GRU": (LayerNormGRU, nn.GRU), "LSTM": (LayerNormLSTM, nn.LSTM)}
Work = Callable[[], Tensor]


def timed(works: dict[str, Work], repeats: int, backward: bool) -> dict[str, float]:
    """Median seconds of each, run in turn so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    with torch.set_grad_enabled(backward):
        for number in range(-1, repeats):  # the first round warms up
            for name, work in works.items():
                start = time.perf_counter()
                out = work()
                if backward:
                    out.sum().backward()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def naive(network: nn.Module, x: Tensor) -> Tensor:
    """The same network, its cell called time by time."""
    cell, state, outs = network.cells[0], None, []
    for frame in x:
        state = cell(frame, state)
        outs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outs)


def networks(sizes: tuple[int, ...], repeats: int, compiled: bool) -> dict[str, dict[str, float]]:
    times, batch, inputs, units = sizes
    x, result = torch.randn(times, batch, inputs), {}
    print(f"{times} times, batch {batch}, {inputs} inputs, {units} units")
    for name, (ours, theirs) in PAIRS.items():
        torch.manual_seed(0)
        a, b = ours(inputs, units), theirs(inputs, units)
        torch.testing.assert_close(a(x)[0], naive(a, x))
        works: dict[str, Work] = {
            "ours": lambda a=a: a(x)[0],
            "naive": lambda a=a: naive(a, x),
            "torch": lambda b=b: b(x)[0],
        }
        if compiled and name == "LSTM":
            whole = torch.compile(a, fullgraph=True)
            works["compiled"] = lambda whole=whole: whole(x)[0]
        for backward in (False, True):
            took = timed(works, repeats, backward)
            label = f"{name}, forward{' and backward' if backward else ''}"
            ratios = {"naive / ours": took["naive"] / took["ours"], "ours / torch": took["ours"] / took["torch"]}
            if "compiled" in took:
                ratios["ours / compiled"] = took["ours"] / took["compiled"]
            result[label] = took | ratios
            shown = "  ".join(f"{key} {value:5.2f}" for key, value in ratios.items())
            print(f"  {label:28} ours {1e3 * took['ours']:8.2f} ms  {shown}")
    return result


def norms(repeats: int) -> dict[str, dict[str, float]]:
    x, result = torch.randn(4096, 512, requires_grad=True), {}
    ours, theirs = LayerNorm(512), nn.LayerNorm(512)

    def elementary() -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + ours.eps).sqrt()
        return centred / sigma * ours.weight + ours.bias

    for backward in (False, True):
        took = timed({"ours": lambda: ours(x), "elementary": elementary, "torch": lambda: theirs(x)}, repeats, backward)
        label = f"LayerNorm, forward{' and backward' if backward else ''}"
        ratios = {"elementary / ours": took["elementary"] / took["ours"], "ours / torch": took["ours"] / took["torch"]}
        result[label] = took | ratios
        shown = "  ".join(f"{key} {value:5.2f}" for key, value in ratios.items())
        print(f"  {label:32} ours {1e3 * took['ours']:6.2f} ms  {shown}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["28,32,28,128", "100,8,64,128", "100,32,64,256"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also the LSTM compiled whole, at the first size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    result: dict[str, dict[str, dict[str, float]]] = {}
    for number, text in enumerate(args.sizes):
        sizes = tuple(int(part) for part in text.split(","))
        if len(sizes) != 4:
            parser.error(f"--sizes {text}; expected TIMES,BATCH,INPUTS,UNITS")
        result[text] = networks(sizes, args.repeats, args.compile and number == 0)
    result["4096 rows of 512"] = norms(args.repeats)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
