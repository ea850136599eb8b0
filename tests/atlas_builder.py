"""Builds one atlas of a chain of linear layers, as a program: to be killed, run twice, or under torchrun.

python atlas_builder.py build FOLDER [--fail RANK | --die RANK]     one build (all ranks, under torchrun)
python atlas_builder.py hold FOLDER                                 take the lock, say so, wait for a line
python atlas_builder.py kill FOLDER SEED                            for each line of input, a killed build
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neuropil.atlas import Atlas
from neuropil.neurons import Site, find_sites

SITES, WIDTH = 12, 40


class Chain:
    """What an atlas needs to know of a model: a chain of linear layers."""

    name, fingerprint, architecture = "chain", "c" * 16, "Sequential"

    def __init__(self) -> None:
        layers = [m for _ in range(SITES) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        with torch.device("meta"):
            self.sites = find_sites(nn.Sequential(*layers, nn.Linear(WIDTH, 3)))

    def tokens(self) -> list[str]:
        return [f"token {i}" for i in range(50)]


CHAIN = Chain()


def columns(site: Site) -> dict[str, Any]:
    """Values that depend on the site alone, with text, lists and numbers among them."""
    rng = np.random.default_rng(site.number)
    words = [[f"w{i}" for i in rng.integers(0, 50, 6)] for _ in range(site.width)]
    ids = rng.integers(0, 9, (site.width, 4))
    return {"score": torch.from_numpy(rng.random(site.width)), "words": words, "ids": ids}


def build(folder: str, pause: float = 0.0, fail: int = -1, die: int = -1) -> int:
    """Two groups; gives the number of parts written."""
    rank = int(os.environ.get("RANK", 0))

    def compute(site: Site) -> dict[str, Any]:
        time.sleep(pause)
        if rank == fail:
            raise ValueError("this rank fails on purpose")
        if rank == die:
            os._exit(17)
        return columns(site)

    with Atlas.create(folder, CHAIN) as atlas:
        done = atlas.add("first", compute, settings={"a": 1}, progress=False)
        done += atlas.add("second", lambda s: {"twice": 2 * columns(s)["score"]}, settings={}, progress=False)
    return done


def kill(folder: str, seed: int) -> None:
    """For each line of input: fork a build, kill it at a random moment, tell how it ended, and its parts."""
    rng = random.Random(seed)

    def parts() -> int:
        return len(list(Path(folder).glob("parts/*/*.parquet")))

    for _ in sys.stdin:
        # So many parts more, and then a moment anywhere in the making of the next one.
        goal, moment, child = parts() + rng.randrange(3), rng.uniform(0.0, 0.01), os.fork()
        if child == 0:
            build(folder)
            os._exit(0)
        status = None
        while parts() < goal and status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(0.0005)
        if status is None:
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        print("killed" if os.WIFSIGNALED(status) else "ended", parts(), flush=True)


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    if what == "build":
        options = {rest[i].removeprefix("--"): int(rest[i + 1]) for i in range(0, len(rest), 2)}
        sys.stdout.write(f"parts {build(folder, pause=0.002, **options)}\n")
    elif what == "hold":
        with Atlas.create(folder, CHAIN):
            print("holding", flush=True)
            sys.stdin.readline()
    elif what == "kill":
        kill(folder, int(rest[0]))
    if torch.distributed.is_initialized():  # else its threads may still run when the program ends, which aborts it
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
