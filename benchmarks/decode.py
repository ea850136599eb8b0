"""How fast is exact decoding? Ours, its peers and the physical limit, side by side in one run.

    python benchmarks/decode.py [--layers N] [--repeats R] [--json FILE]

Prints three ratios, each between medians of interleaved runs on the same matrices:

1. decoding all up-projections of SmolLM2 (46,080 neurons, exact top 10), over the bare bfloat16 matrix
   products (the bar: at most 1.5) and, for CPUs that are slow in bfloat16, over the bare float32 products;
2. the obvious float32 `(W_up @ W_head.T).topk(10)` over ours (the bar: at least 3);
3. one layer of the shape of Llama 3.1 8B (4096 x 14336, vocabulary 128,256, random weights), times 32: the
   whole model's time (the bar: 15 minutes; the paper's figure is up to 15).

On a CPU without bfloat16 or 8-bit dot-product units no screen is faster than float32, so the second bar is
out of reach there: the bare float32 product alone takes most of the obvious way's time. The run says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from neuropil.models import load
from neuropil.topk import InnerProductIndex

TOP = 10


def timed(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def smollm2(layers: int, repeats: int) -> dict[str, float | str]:
    model = load("smollm2")
    head = model.head().weight
    rows = [model.rows(site, "up") for site in model.sites[:: max(1, len(model.sites) // layers)]][:layers]
    index = InnerProductIndex(head)
    small, low = head.bfloat16(), [u.bfloat16() for u in rows]
    index.search(rows[0], TOP)  # chooses the screen
    took = timed(
        {
            "ours": lambda: [index.search(u, TOP) for u in rows],
            "obvious": lambda: [(u @ head.T).topk(TOP) for u in rows],
            "float32": lambda: [u @ head.T for u in rows],
            "bfloat16": lambda: [u @ small.T for u in low],
        },
        repeats,
    )
    scale = len(model.sites) / len(rows)
    return {"screen": index.screen, "neurons": sum(s.width for s in model.sites)} | {
        k: v * scale for k, v in took.items()
    }


def llama_layer(repeats: int) -> dict[str, float | str]:
    d, width, vocabulary, layers = 4096, 14336, 128256, 32
    generator = torch.Generator().manual_seed(0)
    index = InnerProductIndex(torch.randn(vocabulary, d, generator=generator))
    rows = torch.randn(width, d, generator=generator)
    found = index.search(rows[:64], TOP)
    start = time.perf_counter()
    for _ in range(repeats):
        found = index.search(rows, TOP)
    seconds = (time.perf_counter() - start) / repeats
    return {"screen": index.screen, "layer": seconds, "model": layers * seconds, "fallbacks": found.fallbacks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--layers", type=int, default=6, help="layers of SmolLM2 to time (30 for all); figures are for 30"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-llama", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    small = smollm2(args.layers, args.repeats)
    ratios = {
        "ours / bare bfloat16": small["ours"] / small["bfloat16"],
        "ours / bare float32": small["ours"] / small["float32"],
        "obvious float32 / ours": small["obvious"] / small["ours"],
    }
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, screen: {small['screen']}")
    print(f"SmolLM2, {small['neurons']:,} up-projections: {small['ours']:.1f} s")
    for name, ratio in ratios.items():
        print(f"  {name:24} {ratio:5.2f}")
    if small["screen"] == "float32":
        limit = small["obvious"] / small["float32"]
        print(f"  this CPU has no faster product than float32, which bounds the last ratio by {limit:.2f}")
    result = {"smollm2": small, "ratios": ratios}
    if not args.skip_llama:
        big = llama_layer(1)
        result["llama"] = big
        print(
            f"Llama 3.1 8B's shape, screen {big['screen']}: {big['layer']:.1f} s a layer, "
            f"{big['model'] / 60:.1f} minutes for all 32 ({big['fallbacks']} rows fell back)"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
