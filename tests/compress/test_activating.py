"""Selective activation: the sheet's invariants, every kind of base method, rewinding, and the meter of dead neurons."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune as torch_prune

from neuropil.compress import (
    ActivateWhilePruning,
    GraNet,
    dead_neuron_rate,
    dimap_prune,
    dimap_scores,
    pack_sparse,
)
from neuropil.compress._activating_base import without_lowest, without_still_negatives
from neuropil.compress._granet_masks import kept_count
from neuropil.errors import ModelError

EVERY = 4


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)
    )


TOTAL = 54 + 1920 + 100


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 1, 6, 6, generator=generator), torch.randint(5, (16,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def run(cycles: int = 2, steps: int | None = None, **options: Any) -> tuple[Any, ActivateWhilePruning]:
    model = net()
    optimizer = sgd(model)
    given: dict[str, Any] = {"every": EVERY, "cycles": cycles, "ap_rate": 0.05} | options
    pruning = ActivateWhilePruning(model, optimizer, **given)
    step = stepper(model, optimizer)
    for _ in range((cycles + 1) * EVERY if steps is None else steps):
        step()
        pruning.step()
    return model, pruning


def specimen(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, ActivateWhilePruning, Callable[[], None]]:
    """A small convolutional network and a schedule that prunes twice in the twelve steps of the contract."""
    model = net(seed)
    optimizer = sgd(model)
    pruning = ActivateWhilePruning(model, optimizer, every=EVERY, cycles=5, rewind=2, seed=seed)
    return model, optimizer, pruning, stepper(model, optimizer)


def flat(masks: Any) -> Tensor:
    return torch.cat([mask.flatten() for mask in (masks.values() if isinstance(masks, dict) else masks)])


# --- the choice --------------------------------------------------------------------------------------


def test_of_the_negative_the_one_that_moved_least_goes() -> None:
    start = torch.tensor([[-1.0, 1.0, -2.0], [-3.0, -4.0, 5.0]])
    now = torch.tensor([[-1.5, 1.0, -2.1], [-3.2, -4.0, -5.0]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    order = [(0, 2), (1, 0), (0, 0), (1, 2)]  # by movement .1, .2, .5, 10; (0, 1) is positive, (1, 1) is gone
    for count in range(6):
        [kept], removed = without_still_negatives([now], [start], [mask], count, [None])
        gone = set(order[:count])
        assert removed == len(gone)
        assert {(i, j) for i in range(2) for j in range(3) if mask[i, j] and not kept[i, j]} == gone
    assert bool((mask >= kept).all()), "never regrows"


def test_equal_movement_goes_by_index_across_tensors() -> None:
    weights = [torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -1.0])]
    masks = [torch.ones(2, dtype=torch.bool)] * 2
    kept, removed = without_still_negatives(weights, weights, masks, 2, [None, None])
    assert (flat(kept).tolist(), removed) == ([True, False, False, True], 2)


def test_signs_alone_decide_who_may_go() -> None:
    generator = torch.Generator().manual_seed(0)
    start, now = (torch.randn(9, 9, generator=generator) for _ in range(2))
    mask = torch.rand(9, 9, generator=generator) < 0.8
    [kept], removed = without_still_negatives([now], [start], [mask], 10, [None])
    assert removed == 10
    positive = torch.where(now > 0, now * 3 + 1, now)  # what positive weights do changes nothing
    [again], _ = without_still_negatives([positive], [start], [mask], 10, [None])
    assert torch.equal(again, kept)
    [flipped], _ = without_still_negatives([-now], [-start], [mask], 10, [None])
    assert bool((now[mask & ~flipped] > 0).all())
    [signed], _ = without_still_negatives([now], [start], [mask], 10, [-torch.ones(9, 1)])
    assert torch.equal(signed, flipped)


def test_removing_negative_weights_wakes_neurons() -> None:
    """One bias-free layer, non-negative inputs: no pre-activation falls, no neuron dies."""
    generator = torch.Generator().manual_seed(0)
    woken = 0
    for _ in range(50):
        model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.ReLU())
        weight = torch.randn(64, 256, generator=generator)
        x = torch.rand(20, 256, generator=generator)
        mask = torch.rand(64, 256, generator=generator) < 0.3
        model[0].weight.data.copy_(weight * mask)
        before, rate = model[0](x), dead_neuron_rate(model, [x])
        start = weight + torch.randn(64, 256, generator=generator)
        [kept], removed = without_still_negatives([model[0].weight], [start], [mask], 400, [None])
        assert removed == 400
        model[0].weight.data.mul_(kept)
        assert bool((model[0](x) >= before - 1e-5).all())
        after = dead_neuron_rate(model, [x])
        assert after.total <= rate.total
        woken += after.total < rate.total
    assert woken == 50


def test_ties_of_the_base_go_by_index() -> None:
    masks = without_lowest([torch.zeros(3), torch.zeros(3)], [torch.tensor([True, False, True]), torch.ones(3) > 0], 3)
    assert flat(masks).tolist() == [False, False, False, False, True, True]


# --- the schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["magnitude", "lamp", torch_prune.L1Unstructured, "scores"])
@pytest.mark.parametrize("version", ["lite", "pro"])
def test_every_cycle_removes_its_share(base: Any, version: str) -> None:
    cycles = 6
    if base == "scores":
        base = lambda model: {n: p.detach().abs() for n, p in model.named_parameters() if p.dim() > 1}  # noqa: E731
    model, pruning = run(cycles, (2 * cycles + 1) * EVERY, base=base, version=version)
    live = TOTAL
    for by_base, woken in pruning.history:
        total, share = int(0.2 * live + 1e-6), int(0.05 * live + 1e-6)
        assert (by_base, woken) == (total - share, share)
        live -= total
    assert len(pruning.history) == cycles
    assert sum(pruning.counts.values()) == live
    assert pruning.density == pytest.approx(0.8**cycles, abs=0.002)
    weights = torch.cat([model.get_parameter(name).detach().flatten() for name in pruning.masks])
    assert not bool(weights[~flat(pruning.masks)].any())


def test_twentyfive_cycles_leave_four_in_a_thousand() -> None:
    model = nn.Sequential(nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 10))
    optimizer = sgd(model)
    pruning = ActivateWhilePruning(model, optimizer, every=1, rewind=None)
    before = flat(pruning.masks)
    for _ in range(27):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        pruning.step()
        assert bool((before >= flat(pruning.masks)).all()), "a pruned weight came back"
        before = flat(pruning.masks).clone()
    assert len(pruning.history) == 25
    assert pruning.density == pytest.approx(0.8**25, rel=0.02)


def test_without_activation_it_is_the_base_method() -> None:
    """q = 0 against iterative magnitude pruning written out; q = p removes nothing by magnitude."""
    model, pruning = run(3, ap_rate=0.0)
    other = net()
    first = {n: p.detach().clone() for n, p in other.state_dict().items()}
    mask = {n: torch.ones_like(other.get_parameter(n), dtype=torch.bool) for n in pruning.masks}
    optimizer = sgd(other)
    step = stepper(other, optimizer)

    def masked() -> None:
        for n, m in mask.items():
            other.get_parameter(n).data.mul_(m)
            if optimizer.state[other.get_parameter(n)]:
                optimizer.state[other.get_parameter(n)]["momentum_buffer"].mul_(m)

    for t in range(1, 4 * EVERY + 1):
        step()
        masked()
        if t % EVERY == 0 and t < 4 * EVERY:
            pool = torch.cat([other.get_parameter(n).detach().abs()[m] for n, m in mask.items()])
            limit = pool.sort().values[int(0.2 * len(pool) + 1e-6)]
            mask = {n: m & (other.get_parameter(n).detach().abs() >= limit) for n, m in mask.items()}
            other.load_state_dict(first)
            optimizer = sgd(other)
            step = stepper(other, optimizer)
            masked()
    assert all(torch.equal(mask[n], m) for n, m in pruning.masks.items())
    assert all(torch.equal(p, other.get_parameter(n)) for n, p in model.named_parameters())
    assert [woken for _, woken in pruning.history] == [0, 0, 0]

    _, pruning = run(2, ap_rate=0.2)
    assert [by_base for by_base, _ in pruning.history] == [0, 0]


def test_activation_takes_negative_weights_that_stood_still() -> None:
    model, pruning = run(1, EVERY - 1)
    optimizer = pruning.optimizer
    start = {n: net().get_parameter(n).detach() for n in pruning.masks}
    stepper(model, optimizer)()
    now = {n: model.get_parameter(n).detach().clone() for n in pruning.masks}
    pruning.step()
    gone = {n: ~m for n, m in pruning.masks.items()}
    sizes = torch.cat([now[n].abs().flatten() for n in now])
    moved = torch.cat([(now[n] - start[n]).abs().flatten() for n in now])
    base = torch.zeros(TOTAL, dtype=torch.bool)
    base[sizes.argsort()[: pruning.history[0][0]]] = True
    woken = flat(gone) & ~base
    assert int(woken.sum()) == pruning.history[0][1] == 103
    values = torch.cat([now[n].flatten() for n in now])
    assert bool((values[woken] < 0).all())
    others = (values < 0) & ~flat(gone)
    assert moved[woken].max() <= moved[others].min()


@pytest.mark.parametrize("rewind", ["init", 0, 2, "random", None])
def test_what_weights_go_back_to(rewind: Any) -> None:
    model = net()
    optimizer = sgd(model)
    pruning = ActivateWhilePruning(model, optimizer, every=EVERY, cycles=2, rewind=rewind)
    step, seen = stepper(model, optimizer), []
    for t in range(1, 2 * EVERY + 1):
        step()
        if t % EVERY == 0:
            ended = model[4].weight.detach().clone()
        pruning.step()
        seen.append({n: v.clone() for n, v in model.state_dict().items() if "mask" not in n})
    first = seen[1] if rewind == 2 else net().state_dict()
    for at in (EVERY, 2 * EVERY):
        state = seen[at - 1]
        mask = flat(pruning.masks)
        if rewind in ("init", 0, 2):
            for name, value in state.items():
                if name not in pruning.masks:
                    assert torch.equal(value, first[name]), name  # biases, batch norm's memory
            now = torch.cat([state[n].flatten() for n in pruning.masks])
            old = torch.cat([first[n].flatten() for n in pruning.masks])
            assert torch.equal(now[mask], old[mask])
    left = pruning.masks["4.weight"]
    if rewind == "random":
        assert not bool((model[4].weight == ended)[left].any())
        assert not bool((seen[EVERY - 1]["4.weight"] == seen[-1]["4.weight"])[left].any()), "each time other values"
    if rewind is None:
        assert torch.equal(model[4].weight[left], ended[left])
        assert optimizer.state
    else:
        assert not optimizer.state
    assert torch.equal(pruning._starts[1], model[4].weight), "movement begins anew"


def test_pro_trains_between_the_two() -> None:
    model = net()
    optimizer = sgd(model)
    pruning = ActivateWhilePruning(model, optimizer, every=EVERY, cycles=2, version="pro", ap_rate=0.05)
    step, counts, ended = stepper(model, optimizer), [], []
    pruning.cycle_end = lambda model: ended.append(sum(int((model.get_parameter(n) != 0).sum()) for n in pruning.masks))
    for t in range(1, 6 * EVERY + 1):
        step()
        pruning.step()
        if t % EVERY == 0:
            counts.append(sum(pruning.counts.values()))
    assert counts == [2074 - 311, 2074 - 414, 1660 - 249, 1660 - 332, 1328, 1328]
    assert pruning.history == [(311, 103), (249, 83)]
    assert ended == [2074, *counts[:3]], "seen when trained, before it is pruned"


def test_too_few_negative_weights_are_given_back_to_the_base() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU())
    model[0].weight.data.abs_()
    model[0].weight.data[0, :3] = -5.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruning = ActivateWhilePruning(model, optimizer, every=1, cycles=1, rate=0.5, ap_rate=0.1)
    with pytest.warns(UserWarning, match="3 negative weights were left"):
        pruning.step()
    assert pruning.history == [(47, 3)]
    assert pruning.counts == {"0.weight": 50}


def test_batch_norm_can_turn_the_sign() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -1, 1, -1, 1, -1]))
    start = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {"every": 1, "cycles": 1, "rate": 0.5, "ap_rate": 0.5}
    pruning = ActivateWhilePruning(model, optimizer, batchnorm_sign=True, where=lambda n, m: n == "0", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be fewer than half
        pruning.step()
    [(by_base, woken)] = pruning.history
    assert by_base + woken == 27
    gone = ~pruning.masks["0.weight"]
    felt = start * torch.tensor([1.0, -1, 1, -1, 1, -1]).reshape(6, 1, 1, 1)
    assert int((felt[gone] < 0).sum()) >= woken > 20
    assert pruning._norms == [model[1]]


def test_a_base_of_ones_own_and_dimap() -> None:
    model, pruning = run(2, base=lambda model: dimap_scores(model, granularity="layer"))
    _, lamp = run(2, base="lamp")
    assert all(torch.equal(m, lamp.masks[n]) for n, m in pruning.masks.items())
    pruning.remove()
    x = torch.randn(3, 1, 6, 6)
    packed = pack_sparse(model).model
    assert packed(x).equal(model(x))


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_along_with_granet(rate: float) -> None:
    def grown(model: nn.Module, optimizer: torch.optim.Optimizer) -> GraNet:
        return GraNet(model, optimizer, density=(1.0, 0.1), steps=(2, 20, 40), every=5, prune_rate=0.1)

    alone, along = net(), net()
    optimizers = sgd(alone), sgd(along)
    granet, base = grown(alone, optimizers[0]), grown(along, optimizers[1])
    pruning = ActivateWhilePruning(along, optimizers[1], base=base, ap_rate=rate, rewind=None)
    steps = stepper(alone, optimizers[0]), stepper(along, optimizers[1])
    for t in range(1, 41):
        for step in steps:
            step()
        granet.step()
        pruning.step()
        assert sum(pruning.counts.values()) == sum(granet.counts.values()), t
    same = all(torch.equal(m, granet.masks[n]) for n, m in pruning.masks.items())
    assert same == (rate == 0)
    live = TOTAL
    assert len(pruning.history) == 4  # steps 5, 10, 15 and 20
    for t, (by_base, woken) in zip((5, 10, 15, 20), pruning.history, strict=True):
        budget = live - kept_count(base.density_at(t), TOTAL)
        assert by_base + woken == budget
        assert woken == int(rate / 0.2 * budget + 1e-6)
        live -= budget


def test_along_with_granet_resumes() -> None:
    def parts(seed: int) -> tuple[Any, ...]:
        model = net(seed)
        optimizer = sgd(model)
        base = GraNet(model, optimizer, density=(0.8, 0.1), steps=(0, 20, 40), every=5, seed=seed)
        pruning = ActivateWhilePruning(model, optimizer, base=base, rewind=None)
        return model, optimizer, pruning, stepper(model, optimizer)

    def go(found: tuple[Any, ...], steps: int) -> tuple[Any, ...]:
        for _ in range(steps):
            found[3]()
            found[2].step()
        return found

    whole, half, other = go(parts(0), 23), go(parts(0), 12), parts(1)
    for old, new in zip(half[:3], other[:3], strict=True):
        new.load_state_dict(old.state_dict())
    go(other, 11)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), other[0].parameters(), strict=True))
    assert whole[2].history == other[2].history


def test_masks_are_handed_over() -> None:
    model, pruning = run(2)
    x, masks = torch.randn(2, 1, 6, 6), {n: m.clone() for n, m in pruning.masks.items()}
    out = model.eval()(x)
    pruning.to_torch_prune()
    assert torch.equal(model(x), out)
    assert torch.equal(model[4].weight_mask.bool(), masks["4.weight"])
    _, pruning = run(1)
    pruning.remove()
    with pytest.raises(ModelError, match="is gone"):
        _ = pruning.masks


def test_bad_input() -> None:
    model = net()
    optimizer = sgd(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rate": 1.0}, "rate=1"),
        ({"ap_rate": 0.3}, "ap_rate=0.3"),
        ({"ap_rate": -0.1}, "ap_rate"),
        ({"version": "heavy"}, "version"),
        ({"every": None}, "every=None"),
        ({"cycles": 0}, "cycles=0"),
        ({"rewind": "start"}, "rewind='start'"),
        ({"rewind": EVERY}, "rewind=4"),
        ({"base": "snip"}, "base='snip'"),
        ({"base": torch_prune.LnStructured}, "unstructured"),
        ({"rate": math.nan}, "rate=nan"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            ActivateWhilePruning(model, optimizer, **({"every": EVERY} | options))
    granet = GraNet(model, optimizer, steps=(0, 5, 10), every=2)
    with pytest.raises(ValueError, match="in its own time"):
        ActivateWhilePruning(model, optimizer, base=granet)
    with pytest.raises(ModelError, match="masked already"):
        ActivateWhilePruning(model, optimizer, every=EVERY)
    granet.remove()
    pruning = ActivateWhilePruning(model, optimizer, every=1, base=lambda model: {"0.weight": torch.ones(54)})
    with pytest.raises(ModelError, match="must give a score"):
        pruning.step()
    pruning.remove()
    other = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match="other weights"):
        ActivateWhilePruning(other, sgd(other), every=1).load_state_dict(run(1)[1].state_dict())
    smooth = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="no ReLU"):
        ActivateWhilePruning(smooth, sgd(smooth), every=1)


class Functional(nn.Module):
    """A residual block with functions for rectifiers, one of them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm0(self.conv0(x)), inplace=True)
        x = torch.relu(x + self.conv1(x))
        return self.head(x.mean((2, 3)))


def test_functional_models_are_not_called_smooth() -> None:
    model = Functional()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ActivateWhilePruning(model, sgd(model), every=1)


# --- dead neurons ------------------------------------------------------------------------------------


def layer(weight: Tensor, bias: Tensor | None = None) -> Any:
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), nn.ReLU())
    model[0].weight.data.copy_(weight)
    if bias is not None:
        model[0].bias.data.copy_(bias)
    return model


def test_dead_rates_in_the_clear_cases() -> None:
    x, ones = torch.rand(7, 5) + 0.1, torch.ones(3, 5)
    for weight, expected in ((ones, (0, 0)), (-ones, (1, 0)), (0 * ones, (0, 1))):
        rates = dead_neuron_rate(layer(weight), [x])
        assert (rates.dynamic, rates.static) == expected
        assert rates.units == 3
    awake = dead_neuron_rate(layer(0 * ones, torch.tensor([1.0, -1.0, 0.0])), [x])  # its bias keeps the first awake
    assert (awake.dynamic, awake.static) == (0, pytest.approx(2 / 3))


def test_rates_add_up_and_do_not_mind_the_batches() -> None:
    model = net()
    model[4].weight.data[:5] = 0
    x = torch.randn(23, 1, 6, 6)
    whole = dead_neuron_rate(model, [x])
    small = dead_neuron_rate(model, [(part, None) for part in x.split(4)])
    assert set(whole.layers) == set(small.layers) == {"0", "4"}
    with torch.no_grad():
        hidden = model.eval()[:3](x)
        second = model[:6](x)
    model.train()
    assert whole.layers["0"].units == 6 * 16
    assert whole.layers["0"].total == pytest.approx(float((hidden == 0).float().mean()))
    assert whole.layers["4"].total == pytest.approx(float((second == 0).float().mean()))
    assert whole.layers["4"].static == pytest.approx(float((second[:, :5] == 0).float().sum(1).mean()) / 20)
    for name, rate in whole.layers.items():
        assert (small.layers[name].dynamic, small.layers[name].static) == pytest.approx((rate.dynamic, rate.static))
        assert 0 <= rate.dynamic <= rate.total <= 1
    assert whole.total == pytest.approx(whole.dynamic + whole.static)
    channels = dead_neuron_rate(model, [x], per="channel").layers["0"]
    assert channels.units == 6
    assert channels.total == pytest.approx(float((hidden == 0).flatten(2).all(2).float().mean()))


def test_the_meter_leaves_no_trace() -> None:
    model = net().train()
    x = torch.randn(4, 1, 6, 6)
    state = {n: v.clone() for n, v in model.state_dict().items()}
    dead_neuron_rate(model, [x])
    assert model.training
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain, metered = net(), net()
    dead_neuron_rate(metered, [x])
    for other in (plain, metered):
        other(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), metered.parameters(), strict=True))


def test_functions_sums_of_branches_and_held_masks() -> None:
    model = Functional().eval()
    x = torch.randn(5, 1, 6, 6)
    rates = dead_neuron_rate(model, [x])
    assert set(rates.layers) == {"conv0", ""}
    first = torch.relu(model.norm0(model.conv0(x)))
    second = torch.relu(first + model.conv1(first))
    assert rates.layers["conv0"].total == pytest.approx(float((first == 0).float().mean()))
    assert rates.layers[""].total == pytest.approx(float((second == 0).float().mean()))
    assert rates.layers[""].static == 0
    held: Any = dimap_prune(layer(torch.tensor([[1.0, 0.01], [0.02, 0.03]])), 0.75, granularity="layer", hold=True)
    rates = dead_neuron_rate(held.model, [torch.ones(2, 2)])
    assert (rates.dynamic, rates.static) == (0, 0.5)


def test_the_rectifiers_of_torch_s_transformer() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    rates = dead_neuron_rate(model, [torch.randn(3, 5, 8)])
    assert set(rates.layers) == {"linear1"}
    assert rates.units == 5 * 16
    assert 0.2 < rates.dynamic < 0.8
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_language_model_is_measured_by_its_arguments() -> None:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 30, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.OPTConfig(**size, word_embed_proj_dim=16, max_position_embeddings=20)
    model = transformers.OPTForCausalLM(config)  # its perceptrons have ReLU
    rates = dead_neuron_rate(model, [{"input_ids": torch.randint(30, (2, 7))}])
    assert [name.rpartition(".")[2] for name in rates.layers] == ["fc1", "fc1"]
    assert 0.2 < rates.dynamic < 0.8


def test_smooth_units_are_silent_below_a_threshold() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU())
    x = torch.randn(9, 4) * 3
    with pytest.raises(ModelError, match="threshold"):
        dead_neuron_rate(model, [x])
    with torch.no_grad():
        expected = float((model(x).abs() <= 0.05).float().mean())
    assert 0 < expected < 1
    assert dead_neuron_rate(model, [x], threshold=0.05).total == pytest.approx(expected)


def test_bad_input_of_the_meter() -> None:
    model = net()
    with pytest.raises(ValueError, match="no batches"):
        dead_neuron_rate(model, [])
    with pytest.raises(ValueError, match="per="):
        dead_neuron_rate(model, [torch.ones(1, 1, 6, 6)], per="neuron")
    with pytest.raises(ValueError, match="threshold"):
        dead_neuron_rate(model, [torch.ones(1, 1, 6, 6)], threshold=-1.0)
