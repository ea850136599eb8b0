"""Customised bricks, merging, updating and growing: exact, undone to the bit, and nothing else touched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from brick_models import family, ids
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.interpret.bricks import (
    AdapterBrick,
    BrickLibrary,
    CustomBrick,
    LoraBrick,
    edit_brick,
    embedding,
    grow,
    load_brick,
    merge_bricks,
    partition_bricks,
    shrink,
    updating,
)
from neuropil.interpret.bricks.custom import fingerprint
from neuropil.interpret.bricks.merging import arithmetic, average, factored, ties
from neuropil.neurons import capture, find_sites


def down(layer: int) -> str:
    return f"model.layers.{layer}.mlp.down_proj"


def lora(model: Any, name: str, targets: list[str], rank: int = 3, seed: int = 0, **facts: Any) -> LoraBrick:
    """One that does something."""
    brick = LoraBrick.new(name, model, targets, rank, seed=seed, **facts)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for target in targets:
            up = brick.part(target, "up")
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return brick


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- attach and detach --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LoraBrick, AdapterBrick])
def test_detached_is_as_before_to_the_bit(kind: type[CustomBrick]) -> None:
    model = family("llama")
    brick: Any = (
        lora(model, "task", [down(0), "lm_head"])
        if kind is LoraBrick
        else AdapterBrick.new("task", model, {"model.layers.0.mlp": 32}, rank=4)
    )
    with torch.no_grad():
        for weight in brick.parameters():
            weight.add_(0.1)
        before, dense = state(model), model(ids()).logits
        with brick.attach(model):
            assert (model(ids()).logits - dense).abs().max() > 1e-3
            with pytest.raises(ValueError, match="attached; detach"):
                brick.attach(model)
        assert torch.equal(model(ids()).logits, dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with brick.attach(model):
        model(ids()).logits.square().mean().backward()
    assert all(p.grad is not None for p in brick.parameters()), "a brick is trained in its place"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_lora_brick_is_its_change_of_the_weight(name: str) -> None:
    model = family(name)
    target = find_sites(model)[0].write.name.removesuffix(".weight")
    brick = lora(model, "task", [target])
    with torch.no_grad():
        with brick.attach(model):
            wanted = model(ids()).logits
        weight = model.get_submodule(target).weight
        weight += brick.change(target).T if name == "gpt2" else brick.change(target)
        torch.testing.assert_close(model(ids()).logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_lora_brick_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    model = family("llama")
    brick = lora(model, "task", [down(0), down(1)])
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["down_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                target = name.removeprefix("base_model.model.").partition(".lora_")[0]
                parameter.copy_(brick.part(target, "down" if "lora_A" in name else "up"))
        with brick.attach(model):
            torch.testing.assert_close(model(ids()).logits, theirs(ids()).logits, rtol=1e-5, atol=1e-6)


def test_bricks_on_disjoint_layers_commute() -> None:
    model = family("llama")
    a, b = lora(model, "a", [down(0)]), lora(model, "b", [down(1)], seed=1)
    with torch.no_grad():
        with a.attach(model), b.attach(model):
            one = model(ids()).logits
        with b.attach(model), a.attach(model):
            assert torch.equal(model(ids()).logits, one)


def test_a_brick_knows_its_base() -> None:
    model = family("llama")
    brick = lora(model, "task", [down(0)])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(f"{down(1)}.weight")[0, 0] += 1
    with pytest.raises(ModelError, match="made for the model"):
        brick.attach(other)
    brick.attach(other, check=False)
    brick.detach()
    with pytest.raises(ModelError, match="which this model has not"):
        LoraBrick("x", {"nowhere": {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}}).attach(model)
    with pytest.raises(ValueError, match="maps 48 to 32"):
        LoraBrick("x", {down(0): {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}}).attach(model)
    with pytest.raises(ValueError, match="expected down, up"):
        LoraBrick("x", {down(0): {"down": torch.ones(1, 2)}})
    with pytest.raises(ValueError, match="expected a linear map"):
        LoraBrick.new("x", model, ["model.norm"])


# --- the library --------------------------------------------------------------------------------


def test_a_library_keeps_finds_and_attaches(tmp_path: Path) -> None:
    model = family("llama")
    library = BrickLibrary(model)
    prompts = [ids(3, 6, low=3, high=15), ids(3, 6, low=40, high=60)]
    for name, prompt in zip(("low", "high/2"), prompts, strict=True):
        library.add(lora(model, name, [down(0)], key=embedding(model, prompt).mean(0), owner="me", version="2"))
    assert library.retrieve(embedding(model, prompts[0])[0]) == ["low"]
    assert library.retrieve(embedding(model, prompts[1])[0], k=2) == ["high/2", "low"]
    merged = library.merge(["low", "high/2"], [0.5, 0.5], name="both")
    assert len(library) == 3
    files = library.save(tmp_path)
    assert sorted(path.name for path in files) == ["both.safetensors", "high_2.safetensors", "low.safetensors"]
    again = BrickLibrary.load(tmp_path, model)
    assert again.bricks.keys() == library.bricks.keys()
    assert (again["low"].owner, again["low"].version, again["low"].base) == ("me", "2", fingerprint(model))
    assert torch.equal(again["low"].key, library["low"].key)  # type: ignore[arg-type]
    with torch.no_grad():
        with library.active(model, ["both"]):
            wanted = model(ids()).logits
        with again.active(model, ["both"]):
            assert torch.equal(model(ids()).logits, wanted)
    assert merged.targets == (down(0),)
    with pytest.raises(KeyError, match="no brick is called"):
        library["other"]
    with pytest.raises(ValueError, match="owns a brick"):
        library.add(lora(model, "low", [down(0)], owner="you"))
    with pytest.raises(ModelError, match="these are for"):
        library.add(lora(family("gpt2"), "g", ["transformer.h.0.mlp.c_proj"]))
    with pytest.raises(ValueError, match="has a key"):
        BrickLibrary(model).retrieve(torch.ones(3))
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    with pytest.raises(ModelError, match="bad"):
        load_brick(tmp_path / "bad.safetensors")


# --- merging --------------------------------------------------------------------------------


def test_averages_and_arithmetic_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    base, a, b = ({"w": torch.randn(3, 4, generator=generator)} for _ in range(3))
    assert torch.equal(average([a], [1.0])["w"], a["w"])
    torch.testing.assert_close(average([a, a, a], [0.2, 0.3, 0.5])["w"], a["w"])
    torch.testing.assert_close(average([a, b], [1.0, 3.0])["w"], (a["w"] + 3 * b["w"]) / 4)
    torch.testing.assert_close(average([a, b])["w"], average([b, a])["w"])
    assert torch.equal(arithmetic(base, [a, b], [0.0, 0.0])["w"], base["w"])
    torch.testing.assert_close(arithmetic(base, [a, b], [1.0, -0.5])["w"],
                               base["w"] + (a["w"] - base["w"]) - 0.5 * (b["w"] - base["w"]))  # fmt: skip
    for act in (lambda: average([a, {"w": torch.ones(2)}]), lambda: average([]), lambda: average([a], [1.0, 2.0]),
                lambda: ties(base, [a], density=0.0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"merge|weights|share"):
            act()


def test_ties_by_hand_and_by_peft() -> None:
    base = {"w": torch.zeros(4)}
    a, b = {"w": torch.tensor([4.0, -3.0, 0.1, 1.0])}, {"w": torch.tensor([2.0, 5.0, -0.2, -1.0])}
    merged = ties(base, [a, b], density=0.5)["w"]
    assert merged.tolist() == [3.0, 5.0, 0.0, 0.0]  # kept: 4, -3 of a and 2, 5 of b; +5 outvotes -3
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(0)
    changes = [torch.randn(20, 30, generator=generator) for _ in range(3)]
    theirs = merge_utils.ties(changes, torch.ones(3), 0.3)
    ours = ties({"w": torch.zeros(20, 30)}, [{"w": c} for c in changes], density=0.3)["w"]
    torch.testing.assert_close(ours, theirs)


def test_merged_lora_bricks_are_the_sum_of_their_changes() -> None:
    model = family("llama")
    a, b = lora(model, "a", [down(0), down(1)]), lora(model, "b", [down(0)], rank=2, seed=1)
    both = merge_bricks([a, b], [1.0, 0.5], method="sum")
    torch.testing.assert_close(both.change(down(0)), a.change(down(0)) + 0.5 * b.change(down(0)))  # type: ignore
    torch.testing.assert_close(both.change(down(1)), a.change(down(1)))  # type: ignore[attr-defined]
    assert both.name == "a+b"
    assert both.base == a.base
    one = merge_bricks([a], [1.0])
    assert all(torch.equal(one.part(t, p), a.part(t, p)) for t in a.targets for p in a.parts)
    same = merge_bricks([a, a, a], [0.2, 0.3, 0.5])
    torch.testing.assert_close(same.change(down(0)), a.change(down(0)))  # type: ignore[attr-defined]
    left, right = (merge_bricks(order).change(down(0)) for order in ([a, b], [b, a]))  # type: ignore[attr-defined]
    torch.testing.assert_close(left, right)
    voted = merge_bricks([a, b], method="ties", density=0.3).change(down(0))  # type: ignore[attr-defined]
    zero = {"": torch.zeros(32, 48)}
    wanted = ties(zero, [{"": a.change(down(0))}, {"": b.change(down(0))}], density=0.3)[""]
    torch.testing.assert_close(voted, wanted, rtol=1e-4, atol=1e-5)
    matrix = torch.randn(5, 2) @ torch.randn(2, 7)
    parts = factored(matrix)
    assert parts["down"].shape == (2, 7)
    torch.testing.assert_close(parts["up"] @ parts["down"], matrix)


def test_merged_adapters_and_what_cannot_be_merged() -> None:
    model = family("llama")
    a, b = (AdapterBrick.new(n, model, {"model.layers.0.mlp": 32}, rank=4, seed=s) for n, s in (("a", 0), ("b", 1)))
    mean = merge_bricks([a, b])
    torch.testing.assert_close(
        mean.part("model.layers.0.mlp", "down"),
        (a.part("model.layers.0.mlp", "down") + b.part("model.layers.0.mlp", "down")) / 2,
    )
    brick, other = lora(model, "l", [down(0)]), lora(model, "o", [down(0)], base="0" * 32)
    for act, said in (
        (lambda: merge_bricks([a, b], method="sum"), "not linear"),
        (lambda: merge_bricks([a, brick]), "several kinds"),
        (lambda: merge_bricks([brick, other]), "different base"),
        (lambda: merge_bricks([]), "nothing to merge"),
        (lambda: merge_bricks([brick], method="mix"), "expected one of"),
        (lambda: merge_bricks([brick, brick], [1.0, -1.0]), "add up to zero"),
    ):
        with pytest.raises((ValueError, ModelError), match=said):
            act()


# --- updating --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_only_the_brick_is_trained(name: str) -> None:
    model = family(name)
    parts = partition_bricks(model, 6)
    first = find_sites(model)[0]
    before, dense = state(model), model(ids()).logits
    flags = [p.requires_grad for p in model.parameters()]
    with updating(model, parts, {first.name: [2]}) as parameters:
        torch.testing.assert_close(model(ids()).logits, dense)
        optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids()).logits.square().mean().backward()
            optimizer.step()
        mine = {id(p) for p in parameters}
        assert all(p.grad is None for p in model.parameters() if id(p) not in mine)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [p.requires_grad for p in model.parameters()] == flags
    mask = parts.members(first.name)[2]
    touched = {w.name for w in (*first.reads.values(), first.write)} | {w.bias for w in first.reads.values() if w.bias}
    assert all(torch.equal(after[n], before[n]) for n in after if n not in touched)
    for weight in (*first.reads.values(), first.write):
        old, new = (weight.rows(s[weight.name], first.width) for s in (before, after))
        assert torch.equal(old[~mask], new[~mask]), "outside the brick nothing has changed, to the bit"
        assert bool((old[mask] != new[mask]).any(1).all())
    assert (model(ids()).logits - dense).abs().max() > 1e-4


def test_a_chain_is_updated_one_layer_at_a_time() -> None:
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    parts, before = partition_bricks(net, 4), state(net)
    with pytest.raises(ValueError, match="one after the other"), updating(net, parts, {"0": [0], "2": [1]}):
        pass
    assert all(torch.equal(value, before[n]) for n, value in net.state_dict().items())


def test_updating_is_undone_where_it_fails() -> None:
    model = family("llama")
    parts = partition_bricks(model, 6)
    before = state(model)
    name = find_sites(model)[0].name
    with pytest.raises(RuntimeError, match="mine"), updating(model, parts, {name: [0, 1]}):
        raise RuntimeError("mine")
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_an_edit_writes_what_is_wanted(name: str) -> None:
    model = family(name)
    parts = partition_bricks(model, 6)
    site = find_sites(model)[1]
    prompt = ids(1, 5)
    seen: list[Tensor] = []
    module = model.get_submodule(site.write.name.removesuffix(".weight"))
    handle = module.register_forward_hook(lambda _, args, out: seen.append(out.detach().reshape(-1, 32)))
    with capture(model, [site]) as h:
        model(ids(6, 20, seed=4))
        others = h[site.name].flatten(0, -2)
        model(prompt)
        activation = h[site.name].reshape(-1, site.width)[-1]
    wanted = seen[-1][-1] + torch.randn(32, generator=torch.Generator().manual_seed(2))
    active = parts.members(site.name).float() @ activation.abs()
    brick = int(active.argmax())
    edit = edit_brick(model, parts, site.name, brick, activation, wanted, others=others)
    outside = ~parts.members(site.name)[brick]
    with edit.attach(model):
        late = module.register_forward_hook(lambda _, args, out: seen.append(out.detach().reshape(-1, 32)))
        model(prompt)
        late.remove()
    torch.testing.assert_close(seen[-1][-1], wanted, rtol=1e-3, atol=1e-4)
    assert not bool(edit.change(edit.targets[0])[:, outside].any())
    assert int(torch.linalg.matrix_rank(edit.change(edit.targets[0]))) == 1
    plain = edit_brick(model, parts, site.name, brick, activation, wanted)
    disturbed = [float((others @ e.change(e.targets[0]).T).norm()) for e in (edit, plain)]
    assert disturbed[0] < disturbed[1], "other inputs are disturbed less where they are known"
    handle.remove()
    with pytest.raises(ValueError, match="silent"):
        edit_brick(model, parts, site.name, brick, torch.zeros(site.width), wanted)


# --- growing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_growth_preserves_the_function_and_is_undone(name: str) -> None:
    model = family(name)
    site = find_sites(model)[0]
    parts = partition_bricks(model, 6)
    before, dense = state(model), model(ids()).logits.detach()
    changes = grow(model, {site.name: 7})
    made = changes.model
    torch.testing.assert_close(made(ids()).logits, dense, rtol=0, atol=1e-6)
    assert [s.width for s in find_sites(made)] == [site.width + 7, site.width]
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    back = shrink(made, {site.name: site.width}).model
    assert all(torch.equal(value, before[n]) for n, value in back.state_dict().items())
    grown = parts.grown(site.name, 7)
    assert grown.counts[site.name] == 7
    assert int(grown.sizes(site.name)[6]) == 7
    with updating(made, grown, {site.name: [6]}) as parameters:
        assert all(p.requires_grad == any(p is q for q in parameters) for p in made.parameters())
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = made(ids()).logits.square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
    assert losses[-1] < losses[0], "the new neurons learn"
    old = shrink(made, {site.name: site.width}).model
    assert all(torch.equal(value, before[n]) for n, value in old.state_dict().items()), "the old ones stay"


def test_what_cannot_grow_is_refused() -> None:
    model = family("phi3")
    name = find_sites(model)[0].name
    with pytest.raises(ValueError, match="share one parameter"):
        grow(model, {name: 4})
    with pytest.raises(ValueError, match="one neuron or more"):
        grow(model, {name: 0})
    with pytest.raises(KeyError, match="no site"):
        grow(model, {"nowhere": 1})
