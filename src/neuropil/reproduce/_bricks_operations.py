"""The operations of the bricks reproduction: a part of the bricks, and adding, merging, updating, growing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.interpret.bricks import (
    Functionality,
    LoraBrick,
    Partition,
    functional_bricks,
    grow,
    language_loss,
    mean_loss,
    merge_bricks,
    partition_bricks,
    route,
    updating,
)
from neuropil.interpret.bricks.routing import kept_bricks
from neuropil.neurons import find_sites
from neuropil.report import Measurement
from neuropil.reproduce.harness import Meter

ROUTED = "rise of the loss with {:.0%} of the bricks"
ORACLE, CHOSEN, ANY = "each token's own", "chosen for the kind", "drawn at random"
ORACLE_DRAWN, CHOSEN_DRAWN = (f"{name}, random partition" for name in (ORACLE, CHOSEN))
LOSS = "loss on {}"
NONE, SUM, MEAN, GROWN, UPDATED = "the model", "both, summed", "both, averaged", "a grown brick", "its brick updated"
LORA_LAYERS, LORA_RANK, LORA_RATE = range(15, 25), 8, 3e-3
GROWN_LAYER, GROWN_NEURONS, RATE = 20, 64, 2e-3
Test = dict[str, list[Tensor]]


def quick(ids: Tensor) -> dict[str, Any]:
    """A batch without the logits of all tokens but the last."""
    return {"input_ids": ids, "logits_to_keep": 1, "use_cache": False}


# --- answering with a part of the bricks -----------------------------------------------------------------------


def routing(
    net: Any, parts: Partition, learn: Test, test: Test, base: Tensor, settings: dict[str, Any], seed: int,
    progress: Meter,
) -> list[Measurement]:  # fmt: skip
    """The rise of the mean loss over all kinds, for each share of bricks and each way to choose them."""
    random = partition_bricks(net, settings["bricks"], method="random", layers=settings["layers"], seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def drawn(keep: float) -> dict[str, list[int]]:
        return {
            site: torch.randperm(count, generator=generator)[: kept_bricks(keep, count)].tolist()
            for site, count in parts.counts.items()
        }

    def chosen(which: Partition, name: str, keep: float) -> Any:
        return route(net, which, keep, level="instruction", prompt=quick(learn[name][0]))

    ways: dict[str, Callable[[str, float], Any]] = {
        ORACLE: lambda name, keep: route(net, parts, keep),
        ORACLE_DRAWN: lambda name, keep: route(net, random, keep),
        CHOSEN: partial(chosen, parts),
        CHOSEN_DRAWN: partial(chosen, random),
        ANY: lambda name, keep: route(net, parts, keep, level="instruction", bricks=drawn(keep)),
    }
    rows = []
    for label, way in progress.track(list(ways.items()), "answering with few bricks", 0.65, 0.85):
        for keep in settings["keep"]:
            rise = []
            for (name, batches), without in zip(test.items(), base.tolist(), strict=True):
                with torch.no_grad(), way(name, keep):
                    rise.append(mean_loss(net, batches) - without)
            baseline = label in (ANY, CHOSEN_DRAWN, ORACLE_DRAWN)
            mean = sum(rise) / len(rise)
            rows.append(Measurement(label, ROUTED.format(keep), mean, "nats", False, baseline))
    return rows


# --- adding, merging, updating, growing ---------------------------------------------------------------------------


def operations(
    net: Any, found: Functionality, parts: Partition, learn: Test, test: Test, settings: dict[str, Any], seed: int,
    progress: Meter,
) -> list[Measurement]:  # fmt: skip
    """Losses on two kinds and on the rest: with a LoRA brick for each, both merged, a grown and an updated brick."""
    first, second = settings["functions"][:2]
    names = {first: [first], second: [second], "the rest": settings["functions"][2:] or [second]}
    targets = [find_sites(net)[n].write.name.rpartition(".")[0] for n in LORA_LAYERS]  # type: ignore[union-attr]

    def losses(label: str, model: nn.Module) -> list[Measurement]:
        return [
            Measurement(label, LOSS.format(where), sum(mean_loss(model, test[n]) for n in kinds) / len(kinds), "nats",
                        False, label == NONE)
            for where, kinds in names.items()
        ]  # fmt: skip

    rows = losses(NONE, net)
    net.requires_grad_(False)
    bricks = []
    for number, name in enumerate((first, second)):
        progress(0.86 + 0.04 * number, f"training a brick for {name}")
        brick = LoraBrick.new(name, net, targets, LORA_RANK, seed=seed)
        with brick.attach(net, check=False):
            train(net, brick.parameters(), learn[name], settings["steps"], LORA_RATE)
            rows += losses(f"a brick for {name}", net)
        bricks.append(brick)
    for label, method in ((SUM, "sum"), (MEAN, "average")):
        with merge_bricks(bricks, method=method).attach(net, check=False):
            rows += losses(label, net)
    progress(0.94, "growing")
    site = find_sites(net)[GROWN_LAYER].name
    made = grow(net, {site: GROWN_NEURONS}, seed=seed).model
    rows += losses("grown, not trained", made)
    with updating(made, parts.grown(site, GROWN_NEURONS), {site: [parts.counts[site]]}) as parameters:
        train(made, parameters, learn[first], settings["steps"], RATE)
        rows += losses(GROWN, made)
    progress(0.97, "updating")
    brick_of = best_brick(found, parts, first, site)
    before = {name: value.clone() for name, value in net.state_dict().items() if site in name}
    with updating(net, parts, {site: [brick_of]}) as parameters:
        train(net, parameters, learn[first], settings["steps"], RATE)
        rows += losses(UPDATED, net)
    net.load_state_dict(before, strict=False)
    return rows


def best_brick(found: Functionality, parts: Partition, name: str, site: str) -> int:
    """The brick of a site that holds most of a kind's best neurons."""
    return int(functional_bricks(found, parts, score="ap", draws=1).counts[site][found.functions.index(name)].argmax())


def train(net: Any, parameters: Iterable[Any], batches: list[Tensor], steps: int, rate: float) -> None:
    """Adam on these parameters, a batch a step, over and over."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        optimizer.zero_grad()
        language_loss(net, batches[step % len(batches)]).backward()
        optimizer.step()
