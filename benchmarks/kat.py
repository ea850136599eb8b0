"""What does a learnable activation cost? GR-KAN, its peers and the plain MLP, side by side in one run.

    python benchmarks/kat.py [--repeats R] [--json FILE]

Forward and backward pass, medians of interleaved runs on the same input; and the memory by which the process grows in
one such pass, each in a process of its own. Three groups, each relative to its first line:

1. activations alone on [8, 1000, 512]: GELU, SiLU, the rational with its hand-written backward pass, and the same
   formula (with Horner's scheme) left to autograd;
2. the MLP of ViT-T and KAT-T, 192 -> 768 -> 192, on 8 images of 197 tokens: with GELU, as GR-KAN, as GR-KAN left to
   autograd, and as B-splines;
3. one layer 64 -> 64 on 4096 inputs: GELU and Linear, GR-KAN, B-splines here and in pykan (where it is installed).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.layers.bspline_kan import BSplineKAN
from neuropil.layers.kat import GRKAN, GRKANMlp, GroupRational


class Plain(GroupRational):
    """The same function, its backward pass left to autograd."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        a, b = (w.t().repeat_interleave(size // len(w), 1) for w in (self.weight_numerator, self.weight_denominator))
        u, top, below = x.abs(), a[-1], b[-1].abs()
        for c in a[:-1].flip(0):
            top = top * x + c
        for c in b[:-1].flip(0):
            below = below * u + c.abs()
        return top / (1 + below * u)


def plain_mlp() -> nn.Module:
    mlp = GRKANMlp(192, 768)
    mlp.act1, mlp.act2 = Plain(192, init="identity"), Plain(768)
    return mlp


def pykan() -> nn.Module:
    layer = importlib.import_module("kan.KANLayer").KANLayer(64, 64, num=3, k=3)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return First()


GROUPS: dict[str, tuple[tuple[int, ...], dict[str, Callable[[], nn.Module]]]] = {
    "activation on [8, 1000, 512]": (
        (8, 1000, 512),
        {
            "GELU": nn.GELU,
            "SiLU": nn.SiLU,
            "rational": lambda: GroupRational(512),
            "rational, autograd": lambda: Plain(512),
        },
    ),
    "MLP 192-768-192 on [8, 197, 192]": (
        (8, 197, 192),
        {
            "GELU": lambda: nn.Sequential(nn.Linear(192, 768), nn.GELU(), nn.Linear(768, 192)),
            "GR-KAN": lambda: GRKANMlp(192, 768),
            "GR-KAN, autograd": plain_mlp,
            "B-splines": lambda: nn.Sequential(BSplineKAN(192, 768), BSplineKAN(768, 192)),
        },
    ),
    "layer 64-64 on [4096, 64]": (
        (4096, 64),
        {
            "GELU, Linear": lambda: nn.Sequential(nn.GELU(), nn.Linear(64, 64)),
            "GR-KAN": lambda: GRKAN(64, 64),
            "B-splines": lambda: BSplineKAN(64, 64),
            "B-splines, pykan": pykan,
        },
    ),
}


def ready(group: str, name: str) -> Callable[[], None]:
    """One forward and backward pass, of the input's gradient too."""
    shape, makers = GROUPS[group]
    torch.manual_seed(0)
    module, x = makers[name](), torch.randn(*shape, requires_grad=True)

    def work() -> None:
        module.zero_grad()
        x.grad = None
        module(x).sum().backward()

    return work


def growth(group: str, name: str) -> float:
    """Megabytes by which the peak of this process's memory grows in one pass."""
    torch.set_num_threads(1)
    work = ready(group, name)
    nn.Linear(3, 3)(torch.ones(3, 3)).sum().backward()  # what the first pass of all allocates for itself
    before = peak()
    work()
    return peak() - before


def peak() -> float:
    """The most memory that this process has held, in megabytes (Linux; getrusage would begin at the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for group, (_, makers) in GROUPS.items():
        names = list(makers)
        try:
            works = {name: ready(group, name) for name in names}
        except ImportError as error:
            print(f"pykan is left out: {error}")
            names = names[:-1]
            works = {name: ready(group, name) for name in names}
        took = timed(works, args.repeats)
        del works
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            grew = {name: pool.submit(growth, group, name).result() for name in names}
        first = names[0]
        print(f"\n{group:34} {'ms':>9} {'ratio':>7} {'MB':>9} {'ratio':>7}")
        for name in names:
            print(
                f"  {name:32} {1000 * took[name]:9.2f} {took[name] / took[first]:7.2f} "
                f"{grew[name]:9.1f} {grew[name] / max(grew[first], 0.1):7.2f}"
            )
        result[group] = {name: {"seconds": took[name], "megabytes": grew[name]} for name in names}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
