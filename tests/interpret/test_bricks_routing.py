"""Routing: what is computed is what is asked for, the oracle is the bound, and the small selector learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brick_models import family, ids, one_group_at_a_time, planted
from torch import Tensor, nn

from neuropil.interpret.bricks import (
    Cosine,
    MLPSelector,
    Oracle,
    Partition,
    ablated,
    choose,
    collect,
    extract,
    partition_bricks,
    route,
)
from neuropil.interpret.bricks.activity import strength
from neuropil.interpret.bricks.routing import captured, centres, top_bricks
from neuropil.neurons import capture, find_sites

FAMILIES = ["llama", "opt", "gpt2", "phi3"]


@torch.no_grad()
def by_masks(model: Any, parts: Partition, keep: float, level: str = "token") -> Tensor:
    """The definition, slowly: every activation outside the chosen bricks is zero, site after site."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        for site in find_sites(model):
            members = parts.members(site.name).float()

            def mask(_: nn.Module, args: Any, site: Any = site, members: Tensor = members) -> Any:
                h = args[0]
                flat = h.reshape(len(ids()), -1, site.width)
                scores = strength(site, flat) @ members.T
                scores = scores.mean(1, keepdim=True).expand_as(scores) if level == "sequence" else scores
                chosen = top_bricks(scores.flatten(0, 1), keep).float()
                return (h * (chosen @ members).view_as(h),)

            stack.callback(model.get_submodule(site.tap.module).register_forward_pre_hook(mask).remove)
        found: Tensor = model(ids()).logits
    return found


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_chosen_bricks_are_computed_and_no_others(name: str, level: str) -> None:
    model = family(name)
    parts = partition_bricks(model, 6)
    before = {key: module.__dict__.get("forward") for key, module in model.named_modules()}
    with torch.no_grad():
        dense = model(ids()).logits
        with route(model, parts, 1 / 3, level=level) as routing:
            found = model(ids()).logits
        torch.testing.assert_close(found, by_masks(model, parts, 1 / 3, level), rtol=1e-4, atol=1e-5)
        assert routing.share == pytest.approx(1 / 3)
        with route(model, parts, 1.0, level=level):
            torch.testing.assert_close(model(ids()).logits, dense, rtol=1e-5, atol=1e-5)
        with route(model, parts, 0.0, level=level):
            none = model(ids()).logits
        with ablated(model, {site.name: torch.arange(site.width) for site in find_sites(model)}):
            torch.testing.assert_close(none, model(ids()).logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(model(ids()).logits, dense)
    assert {key: module.__dict__.get("forward") for key, module in model.named_modules()} == before
    assert (found - dense).abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_an_instructions_set_is_frozen_and_extracts(name: str) -> None:
    model = family(name)
    parts = partition_bricks(model, 6)
    prompt = ids(1, 7, seed=9)
    chosen = choose(model, parts, prompt, 0.5)
    assert all(len(bricks) == 3 for bricks in chosen.values())
    small = extract(model, parts, chosen).model
    with torch.no_grad(), route(model, parts, 0.5, level="instruction", prompt=prompt) as routing:
        torch.testing.assert_close(model(ids()).logits, small(ids()).logits, rtol=1e-4, atol=1e-5)
        assert routing.share == 0.5
    with capture(model) as seen:
        model(prompt)
    site = find_sites(model)[0]
    scores = strength(site, seen[site.name].reshape(-1, site.width)) @ parts.members(site.name).float().T
    assert chosen[site.name] == top_bricks(scores.mean(0, keepdim=True), 0.5)[0].nonzero()[:, 0].tolist()


def test_a_chain_of_layers_is_routed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.Sigmoid(), nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 3))
    parts, x = partition_bricks(net, 4), torch.randn(7, 8)
    with torch.no_grad():
        dense = net(x)
        h = net[1](net[0](x))
        members = [parts.members(name).float() for name in ("0", "2")]
        h = h * (top_bricks(h @ members[0].T, 0.5).float() @ members[0])
        h = net[3](net[2](h))
        h = h * (top_bricks(h.clamp_min(0) @ members[1].T, 0.5).float() @ members[1])
        wanted = net[4](h)
        with route(net, parts, 0.5) as routing:
            torch.testing.assert_close(net(x), wanted)
            assert routing.share == 0.5
        assert torch.equal(net(x), dense)


def test_a_routed_model_learns_and_generates() -> None:
    model = family("llama")
    parts = partition_bricks(model, 6)
    with route(model, parts, 0.5):
        model(ids()).logits.square().mean().backward()
        out = model.generate(ids(1), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (1, 13)
    weight = model.get_parameter(find_sites(model)[0].write.name)
    assert bool(weight.grad.abs().sum() > 0)


def test_the_oracle_bounds_every_selector() -> None:
    model = family("llama")
    parts = partition_bricks(model, 8)
    inputs, scores = collect(model, parts, [ids(8, 20)])
    cosine, mlp = Cosine(model, parts), MLPSelector(model, parts)
    for site in find_sites(model):
        x, true = inputs[site.name], scores[site.name]
        shares = [float(captured(true, top_bricks(true, k / 8))) for k in range(1, 9)]
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1)
        for selector in (cosine, mlp):
            found = selector(site, x).detach()
            assert all(float(captured(true, top_bricks(found, k / 8))) <= shares[k - 1] + 1e-6 for k in range(1, 9))
        assert torch.equal(cosine(site, x).argmax(1), mlp(site, x).argmax(1)), "before training they agree"


def test_scores_are_what_neurons_do() -> None:
    model = family("opt")
    parts = partition_bricks(model, 6)
    inputs, scores = collect(model, parts, [ids()])
    with capture(model) as seen:
        model(ids())
    for site in find_sites(model):
        h = seen[site.name].reshape(-1, site.width)
        wanted = torch.stack([h[:, mask].clamp_min(0).sum(1) for mask in parts.members(site.name)], 1)
        torch.testing.assert_close(scores[site.name], wanted, rtol=1e-4, atol=1e-5)
        assert inputs[site.name].shape == (40, 32)


def test_the_selector_learns_planted_groups() -> None:
    net, _ = planted(False)
    parts = partition_bricks(net, 8)
    selector = MLPSelector(net, parts)
    with torch.no_grad():
        selector.nets[0][0].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))  # it knows nothing
    x, y = one_group_at_a_time(3000), one_group_at_a_time(200, seed=1)
    inputs, scores = collect(net, parts, [x])
    [site] = find_sites(net)
    true = Oracle(net, parts)(site, y)

    def share(selector: Any) -> float:
        return float(captured(true, top_bricks(selector(site, y).detach(), 1 / 8)))

    before = share(selector)
    held = selector.fit(inputs, scores, keep=1 / 8)[site.name]
    assert share(selector) > before + 0.2
    assert share(selector) == pytest.approx(held, abs=0.1)
    assert share(selector) > 0.9 * share(Cosine(net, parts))
    again = MLPSelector(net, parts)
    again.load_state_dict(selector.state_dict())
    assert torch.equal(again(site, y), selector(site, y))
    centre = centres(net, parts)[site.name][0]
    selector.grow(site.name, centre)
    grown = selector(site, y)
    torch.testing.assert_close(grown[:, :8], again(site, y))
    assert grown.shape == (200, 9)


def test_bad_requests_are_refused() -> None:
    model = family("llama")
    parts = partition_bricks(model, 6)
    for settings, said in (
        ({"level": "word"}, "expected one of"),
        ({"keep": 1.5}, "share of the bricks"),
        ({"level": "instruction"}, "takes its set"),
    ):
        with pytest.raises(ValueError, match=said), route(model, parts, **settings):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="no batch"):
        collect(model, parts, [])
