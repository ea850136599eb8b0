"""Bricks: exact sums, planted groups found again, scores by their peers, the test of chance, what pruning does."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from brick_models import EACH, GROUPS, WIDTH, family, ids, one_group_at_a_time, planted
from scipy import stats
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, average_precision_score
from torch import Tensor, nn

from neuropil import models
from neuropil.changes import Changes
from neuropil.interpret.bricks import (
    Partition,
    ablated,
    average_precision,
    brick_columns,
    brick_outputs,
    extract,
    functional_bricks,
    functionality,
    mass_ratio,
    matched_control,
    neurons_of,
    observe,
    partition_bricks,
    pruning_matrix,
    random_control,
    stability,
)
from neuropil.interpret.bricks.coactivation import coactivation, edge_threshold, token_strengths
from neuropil.interpret.bricks.functionality import balance
from neuropil.interpret.bricks.kmeans import balanced_kmeans, capacities, deal, evened, inertia
from neuropil.interpret.bricks.testing import binomial_threshold, hypergeometric_threshold
from neuropil.neurons import capture, capture_inputs, find_sites

METIS = importlib.util.find_spec("pymetis") is not None


def specimen(seed: int) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 3))

    def act(net: nn.Module) -> Changes:
        return extract(net, partition_bricks(net, 4), {"0": [0, 2]})

    return model, act, (torch.randn(5, 8, generator=torch.Generator().manual_seed(1)),)


# --- the partition --------------------------------------------------------------------------------


def test_the_deal_fills_every_cluster_and_wastes_little() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(60, 6, generator=generator, dtype=torch.float64)
    sizes = capacities(60, 6)
    labels = deal(cost, sizes)
    assert torch.bincount(labels).tolist() == [10] * 6
    rows, columns = linear_sum_assignment(cost.repeat_interleave(10, 1).numpy())
    best = float(cost[rows, columns // 10].sum())
    assert best <= float(cost.gather(1, labels[:, None]).sum()) < 1.15 * best
    assert deal(torch.zeros(7, 3, dtype=torch.float64), capacities(7, 3)).bincount().tolist() == [3, 2, 2]


def test_kmeans_is_near_the_best_equal_clusters() -> None:
    from sklearn.cluster import KMeans

    x = torch.randn(120, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = balanced_kmeans(x, 6)
    free = KMeans(6, n_init=10, random_state=0).fit(x.numpy()).inertia_
    random = torch.arange(6).repeat(20)
    assert free <= inertia(x, labels, 6) < 1.3 * free < inertia(x, random, 6)


@pytest.mark.parametrize("method", ["parameters", "coactivation", "correlation", "random", "blocks"])
def test_bricks_are_of_equal_size(method: str) -> None:
    model = family("llama")
    parts = partition_bricks(model, 6, method=method, data=[ids()])
    assert parts.labels.keys() == {site.name for site in find_sites(model)}
    assert all(parts.sizes(name).tolist() == [8] * 6 for name in parts.labels)
    uneven = partition_bricks(model, 5, method=method, data=[ids()])
    assert all(sorted(uneven.sizes(name).tolist()) == [9, 9, 10, 10, 10] for name in uneven.labels)
    assert all(
        (partition_bricks(model, size=16, method=method, data=[ids()]).sizes(n) == 16).all() for n in parts.labels
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("method", ["parameters", "coactivation", "correlation"])
def test_planted_groups_are_found(gated: bool, method: str) -> None:
    if method == "coactivation" and not METIS:
        pytest.skip("pymetis is not installed")
    net, group = planted(gated)
    [labels] = partition_bricks(net, GROUPS, method=method, data=[one_group_at_a_time()]).labels.values()
    assert adjusted_rand_score(group, labels) == 1.0
    [random] = partition_bricks(net, GROUPS, method="random", seed=1).labels.values()
    assert adjusted_rand_score(group, random) < 0.2


@pytest.mark.parametrize("method", ["parameters", "coactivation", "correlation"])
def test_renumbered_neurons_take_their_labels_along(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    other = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4))
    order = torch.randperm(30)
    with torch.no_grad():
        other[0].weight.copy_(net[0].weight[order])
        other[0].bias.copy_(net[0].bias[order])
        other[2].weight.copy_(net[2].weight[:, order])
    x = [torch.randn(200, 8)]
    before, after = (partition_bricks(n, 5, method=method, data=x).labels["0"] for n in (net, other))
    assert torch.equal(before[order], after)


def test_the_graph_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    [site] = find_sites(net)
    a = torch.tensor([[0.5, 3.0, 0.0], [2.0, 0.25, 1.0]])
    joint = coactivation(site, a)
    assert joint.tolist() == [[0, 1.5, 1], [1.5, 0, 0.25], [1, 0.25, 0]]
    # Of nine entries three are zero: the 10th and 20th percentiles are 0, the 30th lies between 0 and 0.25.
    assert edge_threshold(joint) == pytest.approx(0.99 * np.percentile(joint.numpy(), 30))
    assert edge_threshold(torch.zeros(3, 3)) == float("inf")


def test_layers_of_fewer_places_are_looked_at_on_more_of_the_data() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(300, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
    data = [torch.full((2, 1, 10, 10), float(i + 1)) for i in range(100)]
    found = token_strengths(net, find_sites(net), data, 192)
    # of the 100 places of an image 64 are taken, so that three images fill the sample; the dense layer has one an image
    assert found["0"][:, 0].tolist() == [1.0] * 128 + [2.0] * 64
    assert found["3"].shape == (192, 5)


def test_moving_to_equal_sizes_moves_as_few_as_it_can() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 3)
    even = evened(labels, capacities(12, 3), seed=3)
    assert torch.bincount(even).tolist() == [4, 4, 4]
    assert int((even != labels).sum()) == 3


def test_bad_requests_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    for settings, said in (
        ({"bricks": 6}, "6 bricks of the 5 neurons"),
        ({"bricks": 0}, "expected 1 to 5"),
        ({"bricks": 2, "size": 2}, "give one"),
        ({"method": "spectral"}, "expected one of"),
        ({"bricks": 2, "method": "coactivation"}, "needs data"),
        ({"bricks": 2, "layers": [1]}, "sites 0 to 0"),
    ):
        with pytest.raises(ValueError, match=said):
            partition_bricks(net, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="experts"):
        partition_bricks(family("mixtral"), 2)
    with pytest.raises(ValueError, match="labels must lie"):
        Partition({"0": torch.tensor([0, 2])}, {"0": 2}, "mine")
    parts = partition_bricks(net, 5)
    with pytest.raises(KeyError, match="no bricks"):
        parts.neurons({"7": [0]})
    with pytest.raises(ValueError, match="bricks 0 to 4"):
        parts.neurons({"0": [5]})


# --- exactness of the sum --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_bricks_add_up_to_the_layer(name: str) -> None:
    model = family(name).double()
    parts = partition_bricks(model, 6)
    for site in find_sites(model):
        write = model.get_submodule(site.write.name.rpartition(".")[0])
        seen: list[Tensor] = []
        with capture(model, [site]):
            hook = write.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
            with capture_inputs(model, [site]) as read:
                model(ids())
            hook.remove()
        x = next(iter(read[site.name].values()))
        each = brick_outputs(model, parts, site.name, x)
        bias = getattr(write, "bias", None)
        total = each.sum(0) + (bias if bias is not None else 0)
        torch.testing.assert_close(total.reshape(seen[0].shape), seen[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_a_smaller_model_is_the_model_with_the_others_at_zero(name: str) -> None:
    model = family(name)
    parts = partition_bricks(model, 6)
    [first, second] = find_sites(model)
    kept: dict[str, Any] = {first.name: [0, 3], second.name: [5]}
    gone = {site.name: parts.neurons({site.name: [b for b in range(6) if b not in kept[site.name]]})[site.name]
            for site in (first, second)}  # fmt: skip
    with torch.no_grad():
        dense = model(ids()).logits
        with ablated(model, gone):
            wanted = model(ids()).logits
        changes = extract(model, parts, kept)
        torch.testing.assert_close(changes.model(ids()).logits, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(model(ids()).logits, dense), "the model that was given has been changed"
        whole = extract(model, parts, {first.name: range(6), second.name: range(6)}).model
        torch.testing.assert_close(whole(ids()).logits, dense, rtol=1e-6, atol=1e-6)
        if name == "gpt2":
            with pytest.raises(ValueError, match="keep one brick"):
                extract(model, parts, {first.name: []})
        else:
            none: Any = extract(model, parts, {first.name: []})
            with ablated(model, {first.name: torch.arange(first.width)}):
                torch.testing.assert_close(none.model(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)
    assert [site.width for site in find_sites(changes.model)] == [16, 8]
    assert sum(p.numel() for p in changes.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_what_cannot_be_taken_apart_says_why() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    parts = partition_bricks(net, 2)
    changes = extract(net, parts, {"0": [0]})
    assert changes.changed == ()
    assert "conv" in changes.left["0"]
    with pytest.raises(ValueError, match="cannot be taken apart"):
        brick_outputs(net, parts, "0", torch.zeros(1, 1, 8, 8))


# --- what neurons are for --------------------------------------------------------------------------------


def test_average_precision_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    act = torch.from_numpy(random.integers(0, 5, (40, 7)).astype(np.float32))  # many ties
    act[:, 0] = 1.0
    labels = torch.from_numpy(random.random((3, 40)) < 0.3)
    weights = balance(labels)
    plain, weighted = average_precision(act, labels), average_precision(act, labels, weights)
    for f in range(3):
        for n in range(7):
            wanted = average_precision_score(labels[f], act[:, n])
            assert float(plain[f, n]) == pytest.approx(wanted, abs=1e-12)
            wanted = average_precision_score(labels[f], act[:, n], sample_weight=weights[f])
            assert float(weighted[f, n]) == pytest.approx(wanted, abs=1e-12)
    torch.testing.assert_close(plain[:, 0], labels.double().mean(1))
    torch.testing.assert_close(weighted[:, 0], torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(average_precision((3 * act).exp(), labels), plain)


def two_functions(n: int = 24) -> tuple[Any, dict[str, list[Tensor]]]:
    """Neuron 0 fires on the first function, 1 on the second, 2 on both alike, 3 never."""
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, -1]]))
    x = 0.5 + torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(x)
    return net, {"first": [torch.cat([x, zero], 1)], "second": [torch.cat([zero, x], 1)]}


def test_predictivity_by_hand() -> None:
    net, functions = two_functions()
    found = functionality(net, functions)
    p = found.predictivity["0"]
    torch.testing.assert_close(p[:, :2], torch.ones(2, 2, dtype=torch.float64))  # whichever way it points
    torch.testing.assert_close(p[:, 3], torch.full((2,), 0.5, dtype=torch.float64))  # a constant says nothing
    assert float(found.ap["0"][0, 0]) == pytest.approx(1)
    assert found.ap["0"][0, 1] < 0.6
    assert found.ranking("ap")["0"][:, 0].tolist() == [0, 1]
    assert found.score("difference")["0"][0, 0] > 0.5 > found.score("difference")["0"][0, 2].abs()
    assert found.score("ratio")["0"][0].tolist() == pytest.approx([1, 0, 0.5, 0])
    assert found.best()["0"].tolist() == pytest.approx([1, 1])
    flipped = functionality(net, dict(reversed(functions.items()))).predictivity["0"]
    torch.testing.assert_close(flipped, p.flip(0))
    with pytest.raises(ValueError, match="expected one of"):
        found.score("gradient")


def test_the_order_and_batching_of_sequences_change_nothing() -> None:
    model = family("llama")
    one = {"low": [ids(16, high=30)], "high": [ids(16, low=31)]}
    other = {"low": list(one["low"][0].flip(0).split(5)), "high": list(one["high"][0].split(3))}
    for a, b in zip(*(functionality(model, f).predictivity.values() for f in (one, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)  # a batch of other size rounds otherwise, and ties break


def test_padding_is_left_out() -> None:
    model = family("llama")
    plain = observe(model, [ids(3, 6)])
    padded = torch.cat([ids(3, 6), torch.zeros(3, 4, dtype=torch.long)], 1)
    mask = (torch.arange(10) < 6).long().expand(3, -1)
    seen = observe(model, [{"input_ids": padded, "attention_mask": mask}])
    for name in plain.peak:
        torch.testing.assert_close(seen.peak[name], plain.peak[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.size[name], plain.size[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.mean[name], plain.mean[name], rtol=1e-4, atol=1e-5)


def test_images_and_filters_have_functions_too() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    found = functionality(net, {"dark": [torch.rand(20, 1, 8, 8) - 1], "light": [torch.rand(20, 1, 8, 8)]})
    assert found.predictivity["0"].shape == (2, 6)
    assert float(found.best()["0"].min()) > 0.95


def test_too_little_data_is_refused_or_warned_of() -> None:
    net, functions = two_functions()
    with pytest.raises(ValueError, match="two or more"):
        functionality(net, {"first": functions["first"]})
    with pytest.raises(ValueError, match="one sequence"):
        functionality(net, functions | {"third": [torch.ones(1, 2)]})
    with pytest.warns(UserWarning, match="fewer than 30"):
        functionality(net, {name: [x[0][:5]] for name, x in functions.items()})
    with pytest.raises(ValueError, match="no batch"):
        observe(net, [])


# --- the test of chance --------------------------------------------------------------------------------


@pytest.mark.parametrize(("neurons", "size", "top"), [(3072, 192, 30), (1536, 64, 15), (48, 6, 5), (10, 10, 3)])
def test_thresholds(neurons: int, size: int, top: int) -> None:
    for threshold, law in (
        (hypergeometric_threshold(neurons, size, top), stats.hypergeom(neurons, size, top)),
        (binomial_threshold(neurons, size, top), stats.binom(top, size / neurons)),
    ):
        assert law.sf(threshold) <= 0.001
        assert threshold == 0 or law.sf(threshold - 1) > 0.001


def planted_functions() -> tuple[Any, Tensor, dict[str, list[Tensor]]]:
    net, group = planted(False)
    where = torch.arange(GROUPS).repeat_interleave(WIDTH)
    generator = torch.Generator().manual_seed(5)
    functions = {str(g): [torch.randn(24, GROUPS * WIDTH, generator=generator) * (where == g)] for g in range(GROUPS)}
    return net, group, functions


def test_planted_bricks_are_functional_and_random_ones_are_not() -> None:
    net, group, functions = planted_functions()
    found = functionality(net, functions)
    parts = partition_bricks(net, GROUPS)
    tested = functional_bricks(found, parts, share=1 / GROUPS, score="ap")
    assert tested.rejected["0"].tolist() == [1 / GROUPS] * GROUPS
    assert tested.degree["0"].tolist() == pytest.approx([GROUPS] * GROUPS)
    assert int(tested.counts["0"].sum()) == GROUPS * EACH
    for g in range(GROUPS):
        [brick] = tested.bricks_of(str(g))["0"].tolist()
        assert torch.equal(parts.labels["0"] == brick, group == g)
        assert tested.functions_of("0")[brick] == str(g)
    random = functional_bricks(found, partition_bricks(net, GROUPS, method="random", seed=1), share=1 / GROUPS)
    assert float(random.rejected["0"].mean()) <= 0.02
    assert float(tested.control["0"].max()) <= 0.003
    with pytest.raises(ValueError, match="expected one of"):
        tested.bricks_of("8")


def test_subfunctions_are_counted_together() -> None:
    net, _, functions = planted_functions()
    named = {f"{'even' if int(g) % 2 == 0 else 'odd'}/{g}": x for g, x in functions.items()}
    found = functionality(net, named)
    assert found.functions == ("even", "odd")
    tested = functional_bricks(found, partition_bricks(net, GROUPS), share=1 / GROUPS, score="ap")
    assert tested.counts["0"].shape == (2, GROUPS)
    assert tested.counts["0"].sum(1).tolist() == [4 * EACH, 4 * EACH], "with repetition"
    assert int(tested.thresholds["0"][0, 0]) == binomial_threshold(GROUPS * EACH, EACH, 4 * EACH)


def test_bricks_are_stabler_than_neurons_that_change_places() -> None:
    net, group, functions = planted_functions()
    found, parts = functionality(net, functions), partition_bricks(net, GROUPS)
    same = stability(found, found, parts)
    assert same.neurons["0"] == pytest.approx(1)
    assert same.bricks["0"] == pytest.approx(1)
    order = torch.arange(len(group))
    for g in range(GROUPS):  # the neurons of each brick, moved on by one place
        order[parts.labels["0"] == g] = order[parts.labels["0"] == g].roll(1)
    moved = dataclasses.replace(found, ap={"0": found.ap["0"][:, order]}, negation={"0": found.negation["0"][:, order]})
    other = stability(found, moved, parts)
    assert other.bricks["0"] == pytest.approx(1)
    assert other.neurons["0"] < 0.999
    with pytest.raises(ValueError, match="same functions"):
        stability(found, functionality(net, {"0": functions["0"], "1": functions["1"]}), parts)


def test_the_overlap_of_functions() -> None:
    net, _, functions = planted_functions()
    overlap = functionality(net, functions).overlap(1 / GROUPS, "ap")
    torch.testing.assert_close(overlap, torch.eye(GROUPS, dtype=torch.float64))


# --- pruning --------------------------------------------------------------------------------


def squared(model: nn.Module, x: Any) -> Tensor:
    """Distance from what the layer would write, each input being its own target."""
    return (model(x) - model.target(x)).square().mean()  # type: ignore[operator]


def test_pruning_a_function_hurts_that_function_alone() -> None:
    net, _, functions = planted_functions()
    twin = copy.deepcopy(net)
    object.__setattr__(net, "target", lambda x: twin(x).detach())
    found = functionality(net, functions)
    parts = partition_bricks(net, GROUPS)
    for sets in (
        {name: neurons_of(found, name, 1 / GROUPS) for name in functions},
        {name: neurons_of(found, name, 1 / GROUPS, parts=parts) for name in functions},
    ):
        matrix = pruning_matrix(net, sets, functions, loss=squared)
        assert matrix.base.abs().max() == 0
        assert float(matrix.own.min()) > 0
        assert float(matrix.others.abs().max()) < 1e-12
        assert matrix.specificity > 0


def test_ablation_by_mask_is_zeroed_columns() -> None:
    model = family("llama")
    [first, _] = find_sites(model)
    chosen = torch.tensor([1, 5, 40])
    with torch.no_grad():
        dense = model(ids()).logits
        with ablated(model, {first.name: torch.zeros(0, dtype=torch.long)}):
            assert torch.equal(model(ids()).logits, dense), "no neuron, no change"
        with ablated(model, {first.name: chosen}):
            masked = model(ids()).logits
        weight = model.get_parameter(first.write.name)
        kept = weight.clone()
        weight[:, chosen] = 0
        torch.testing.assert_close(model(ids()).logits, masked, rtol=1e-5, atol=1e-5)
        weight.copy_(kept)
        assert torch.equal(model(ids()).logits, dense)


def test_means_and_shuffles() -> None:
    net, functions = two_functions()
    found = functionality(net, functions)
    x = functions["first"][0]
    with ablated(net, {"0": torch.tensor([0, 2])}, "mean", values=found.mean), capture(net) as seen:
        net(x)
    torch.testing.assert_close(seen["0"][:, 0], found.mean["0"][0].float().expand(len(x)))
    assert torch.equal(seen["0"][:, 1], torch.zeros(len(x)))
    with capture(net) as plain:
        net(x)
    before = plain["0"].clone()
    with ablated(net, {"0": torch.tensor([0, 1])}, "shuffle"), capture(net) as seen:
        net(x)
    after = seen["0"]
    assert not torch.equal(after[:, :2], 4 * before[:, :2])
    torch.testing.assert_close(after[:, :2].flatten().sort().values, 4 * before[:, :2].flatten().sort().values)
    assert torch.equal(after[:, 2:], before[:, 2:])
    with pytest.raises(ValueError, match="needs values"), ablated(net, {}, "mean"):
        pass
    with pytest.raises(ValueError, match="expected one of"), ablated(net, {}, "noise"):
        pass
    with pytest.raises(KeyError, match="no site"), ablated(net, {"9": torch.tensor([0])}):
        pass


def test_controls_are_as_many_and_as_active() -> None:
    model = family("llama")
    found = functionality(model, {"low": [ids(16, high=30)], "high": [ids(16, low=31)]})
    chosen = neurons_of(found, "low", 0.2)
    random, matched = random_control(found, chosen, 3), matched_control(found, chosen, 3)
    for name in chosen:
        assert len(chosen[name]) == len(random[name]) == len(matched[name].unique()) == 9
        assert not set(chosen[name].tolist()) & set(matched[name].tolist())
    assert abs(mass_ratio(found, matched, chosen) - 1) < 0.1
    assert any(not torch.equal(matched[n], matched_control(found, chosen, 4)[n]) for n in matched)
    with pytest.raises(ValueError, match="choose fewer"):
        matched_control(found, neurons_of(found, "low", 0.6), 0)
    everywhere = neurons_of(found, None, 0.2, score="predictivity")
    first = next(iter(everywhere))
    mean = found.predictivity[first].mean(0)
    assert set(everywhere[first].tolist()) == set(mean.argsort(descending=True, stable=True)[:9].tolist())
    with pytest.raises(ValueError, match="share of the neurons"):
        neurons_of(found, "low", 0.0)
    with pytest.raises(ValueError, match="expected one of"):
        neurons_of(found, "middle", 0.1)


# --- columns --------------------------------------------------------------------------------


def test_columns() -> None:
    net, group, functions = planted_functions()
    found, parts = functionality(net, functions), partition_bricks(net, GROUPS)
    tested = functional_bricks(found, parts, share=1 / GROUPS, score="ap")
    [site] = find_sites(net)
    columns = brick_columns(parts, found, tested)(site)
    assert [*columns] == ["brick", "brick_function", *(f"predictivity_{g}" for g in range(GROUPS))]
    assert columns["brick_function"] == [str(g) for g in group.tolist()]
    assert torch.equal(columns["brick"].long(), parts.labels["0"])
    elsewhere = partition_bricks(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)), 2)
    none = brick_columns(Partition({"7": elsewhere.labels["0"]}, {"7": 2}, "mine"), found, tested)(site)
    assert none["brick"] == [None] * (GROUPS * EACH)
    with pytest.raises(ValueError, match="share a column"):
        brick_columns(parts, functionality(net, {"a b": functions["0"], "a-b": functions["1"]}), tested)


# --- a real model --------------------------------------------------------------------------------


def test_smollm2_tells_sums_from_prose() -> None:
    try:
        loaded = models.load("smollm2")
    except models.loading.ModelError as error:  # type: ignore[attr-defined]
        pytest.skip(str(error))
    from neuropil.interpret.bricks.texts import text_windows

    net = loaded.module()
    train = {name: text_windows(name, loaded.tokenizer, 16, 12)[0] for name in ("arithmetic", "numerals")}
    test = {name: text_windows(name, loaded.tokenizer, 16, 12)[1] for name in train}
    layers = [6, 12]
    found = functionality(net, train, layers=layers)
    assert all(float(best.min()) > 0.95 for best in found.best().values())
    parts = partition_bricks(loaded, 24, layers=layers)
    assert all(parts.sizes(name).tolist() == [64] * 24 for name in parts.labels)
    name = loaded.sites[6].name
    again = functionality(net, test, layers=layers)
    top = found.top(kind="ap")[name][0]
    assert float(again.ap[name][0, top].mean()) > 0.9, "what is learnt on some windows holds on others"
