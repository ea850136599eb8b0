"""GraNet: the sheet's invariants, the baselines as special cases, masks through state_dict, and pruning plasticity."""

import copy
import io
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from neuropil.compress._granet_masks import erk, kept_count, largest, prune, random_mask, regenerate, split_count
from neuropil.compress.granet import GraNet
from neuropil.compress.plasticity import Plasticity, pruning_plasticity
from neuropil.data import digits
from neuropil.errors import ModelError
from neuropil.training import fit, supervised

T = 40


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)
    )


def batch(seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 1, 6, 6, generator=generator), torch.randint(5, (16,), generator=generator)


def sgd(model: nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4} | options)


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    x, y = batch()

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def made(model: nn.Module, optimizer: torch.optim.Optimizer, **options: object) -> GraNet:
    given: dict = {"density": (0.5, 0.1), "steps": (0, 20, T), "every": 5} | options
    return GraNet(model, optimizer, **given)


def specimen(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, GraNet, Callable[[], None]]:
    """A small convolutional network, its optimizer, a sparse-to-sparse schedule and one training step."""
    model = net(seed)
    optimizer = sgd(model)
    return model, optimizer, made(model, optimizer, seed=seed), stepper(model, optimizer)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the schedule ----------------------------------------------------------------------------------


def test_the_density_is_cubic_and_ends_exactly() -> None:
    model = net()
    granet = made(model, sgd(model), density=(1.0, 0.1), steps=(10, 30, 40))
    assert [granet.density_at(t) for t in (0, 10, 30, 40)] == [1.0, 1.0, 0.1, 0.1]
    assert granet.density_at(20) == pytest.approx(1 - 0.7875)  # half-way from 0 to 90 % sparsity
    densities = [granet.density_at(t) for t in range(41)]
    assert densities == sorted(densities, reverse=True)


def test_the_exchanged_share_is_a_cosine() -> None:
    model = net()
    granet = made(model, sgd(model), prune_rate=0.5)
    assert granet.rate_at(0) == 0.5
    assert granet.rate_at(T) == granet.rate_at(2 * T) == pytest.approx(0.005)
    assert granet.rate_at(T // 2) == pytest.approx((0.5 + 0.005) / 2)


@pytest.mark.parametrize("density", [(1.0, 0.1), (0.5, 0.1), (0.3, 0.3)])
@pytest.mark.parametrize("growth", ["gradient", "random"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_exact_sparsity_and_true_zeros_at_every_step(density: tuple[float, float], growth: str, optimizer: str) -> None:
    model = net()
    stepping = sgd(model) if optimizer == "sgd" else torch.optim.AdamW(model.parameters(), lr=0.01)
    granet = made(model, stepping, density=density, growth=growth, steps=(3, 23, T))
    step, total, last = stepper(model, stepping), 54 + 1920 + 100, density[0]
    for t in range(1, T + 1):
        step()
        granet.step()
        if t <= 23 and (t % 5 == 0 or t == 23):  # 23 is no multiple of 5, and the end all the same
            last = granet.density_at(t)
        assert sum(granet.counts.values()) == kept_count(last, total)
        for name, mask in granet.masks.items():
            weight = model.get_parameter(name)
            remembered = [v for v in stepping.state[weight].values() if torch.is_tensor(v) and v.shape == mask.shape]
            assert len(remembered) == (1 if optimizer == "sgd" else 2)
            assert all(not bool(v[~mask].any()) for v in (weight, *remembered))
    assert granet.density == kept_count(density[1], total) / total


@pytest.mark.parametrize("final", [0.05, 0.3])
def test_uniform_pruning_spares_the_classifier(final: float) -> None:
    model = net()
    optimizer = sgd(model)
    granet = made(model, optimizer, density=(1.0, final), scope="uniform")
    step = stepper(model, optimizer)
    for _ in range(T):
        step()
        granet.step()
    rest = (final * 2074 - 0.2 * 100) / 1974
    if final == 0.3:
        expected = {"0.weight": 16, "4.weight": 576, "6.weight": 30}
    else:
        expected = {"0.weight": int(54 * rest), "4.weight": int(1920 * rest), "6.weight": 20}
    assert granet.counts == expected


def test_a_dense_schedule_is_plain_training_to_the_bit() -> None:
    plain, masked = net(), net()
    optimizers = sgd(plain), sgd(masked)
    granet = made(masked, optimizers[1], density=(1.0, 1.0), prune_rate=0.0)
    steps = stepper(plain, optimizers[0]), stepper(masked, optimizers[1])
    for _ in range(T):
        for step in steps:
            step()
        granet.step()
    granet.remove()
    assert equal(plain.state_dict(), masked.state_dict())


def test_a_hand_written_rigl_makes_the_same_steps() -> None:
    ours, theirs = net(), net()
    options = {"density": 0.2, "steps": T, "every": 5, "prune_rate": 0.3, "min_prune_rate": 0.3}
    optimizer, other = sgd(ours), sgd(theirs)
    granet = GraNet.rigl(ours, optimizer, **options)
    masks = {k: m.clone() for k, m in granet.masks.items()}

    def mask_all() -> None:
        for name, mask in masks.items():
            weight = theirs.get_parameter(name)
            weight.data[~mask] = 0
            if "momentum_buffer" in other.state[weight]:
                other.state[weight]["momentum_buffer"][~mask] = 0

    mask_all()
    step, twin = stepper(ours, optimizer), stepper(theirs, other)
    for t in range(1, T + 1):
        step()
        granet.step()
        twin()
        mask_all()
        for name, mask in masks.items() if t % 5 == 0 else ():
            weight = theirs.get_parameter(name)
            live = mask.flatten().nonzero().flatten().tolist()
            live.sort(key=lambda i: abs(float(weight.data.flatten()[i])))
            out = math.ceil(0.3 * len(live))
            new = torch.zeros(mask.numel(), dtype=torch.bool)
            new[live[out:]] = True
            absent = (~new).nonzero().flatten().tolist()
            absent.sort(key=lambda i: -abs(float(weight.grad.flatten()[i])))
            new[absent[:out]] = True
            masks[name] = new.reshape(mask.shape)
        mask_all()
        assert equal(granet.masks, masks)
    assert all(torch.equal(theirs.get_parameter(n), p) for n, p in ours.named_parameters())


def test_without_exchange_it_is_gradual_magnitude_pruning() -> None:
    model = net()
    optimizer = sgd(model)
    granet = GraNet.gmp(model, optimizer, density=0.1, steps=(0, 20, T), every=5)
    step = stepper(model, optimizer)
    for t in range(1, T + 1):
        before = torch.cat([m.flatten() for m in granet.masks.values()])
        step()
        weights = torch.cat([model.get_parameter(n).detach().flatten() for n in granet.masks]) * before
        granet.step()
        after = torch.cat([m.flatten() for m in granet.masks.values()])
        keep = kept_count(granet.density_at(t), 2074) if t % 5 == 0 and t <= 20 else int(before.sum())
        expected = torch.zeros_like(before)
        expected[weights.abs().topk(keep).indices] = True
        assert torch.equal(after, expected)


def test_baselines_are_settings_of_one_object() -> None:
    def run(make: Callable[..., GraNet], **options: object) -> tuple[GraNet, list[dict[str, Tensor]]]:
        model = net()
        optimizer = sgd(model)
        granet = make(model, optimizer, density=0.2, **options)
        step, seen = stepper(model, optimizer), []
        for _ in range(T):
            step()
            granet.step()
            seen.append({k: m.clone() for k, m in granet.masks.items()})
        return granet, seen

    static, masks = run(GraNet.static, steps=T, every=5)
    assert all(equal(masks[0], m) for m in masks)
    evolved, masks = run(GraNet.set, steps=T, every=5)
    assert not equal(masks[0], masks[-1])
    assert evolved.counts == static.counts
    again, same = run(GraNet.set, steps=T, every=5)
    assert all(equal(a, b) for a, b in zip(masks, same, strict=True))  # its own generator
    shot, masks = run(GraNet.one_shot, at=12)
    assert all(bool(m.all()) for m in masks[10].values())
    assert all(equal(masks[11], m) for m in masks[11:])
    assert shot.density == again.density == kept_count(0.2, 2074) / 2074


# --- regeneration ------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0, 1), st.sampled_from([(64, 64), (8, 3, 5, 5), (2, 2)]), st.booleans())
@settings(max_examples=50, deadline=None)
def test_regeneration_conserves_the_count(seed: int, rate: float, shape: tuple[int, ...], tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, score = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if tied:
        weight, score = weight.round(), score.round() * 0
    mask = random_mask(shape, weight.numel() // 3, generator)
    kept, grown = regenerate(weight, mask, score, rate)
    removed = math.ceil(rate * int(mask.sum()))
    assert int((kept | grown).sum()) == int(mask.sum())
    assert int(grown.sum()) == removed
    assert not bool((kept & grown).any())
    assert not bool((kept & ~mask).any())
    if removed and not tied:
        absent = score.abs()[~kept]
        assert set(score.abs()[grown].tolist()) == set(absent.topk(removed).values.tolist())
        assert removed == int(mask.sum()) or weight[kept].abs().min() >= weight[mask & ~kept].abs().max()


@pytest.mark.parametrize("returning", ["keep", "reset"])
def test_growth_alone_changes_no_output(returning: str) -> None:
    model = net()
    optimizer = sgd(model)
    granet = made(model, optimizer, density=(0.3, 0.3), returning=returning)
    step = stepper(model, optimizer)
    for _ in range(4):
        step()
        granet.step()
    step()
    before, weights = granet.masks, {n: model.get_parameter(n).detach().clone() for n in granet.masks}
    before = {n: m.clone() for n, m in before.items()}
    granet.step()
    pruned = copy.deepcopy(model).eval()
    came = 0
    for name, mask in granet.masks.items():
        weight, old = model.get_parameter(name), before[name]
        kept, grown = regenerate(weights[name] * old, old, weight.grad, granet.rate_at(5))
        new = grown if returning == "reset" else grown & ~old
        came += int(new.sum())
        assert torch.equal(mask, kept | grown)
        assert not bool(weight[new].any())
        assert not bool(optimizer.state[weight]["momentum_buffer"][new].any())
        if returning == "keep":
            assert torch.equal(weight[old & grown], weights[name][old & grown])
        pruned.get_parameter(name).data[new] = 0
    x, _ = batch(1)
    assert came > 50
    assert torch.equal(pruned(x), model.eval()(x))


def test_a_weight_removed_by_pruning_comes_back_at_zero() -> None:
    model = net()
    optimizer = sgd(model)
    granet = made(model, optimizer, density=(1.0, 0.5), steps=(0, 5, 10), every=5)
    step = stepper(model, optimizer)
    for _ in range(5):
        step()
        survivors = largest(torch.cat([model.get_parameter(n).detach().abs().flatten() for n in granet.masks]), 1037)
        granet.step()
    weights = torch.cat([model.get_parameter(n).flatten() for n in granet.masks])
    regrown = torch.cat([m.flatten() for m in granet.masks.values()]) & ~survivors
    assert int(regrown.sum()) > 50
    assert not bool(weights[regrown].any())


# --- counts ------------------------------------------------------------------------------------------


def test_erk_densities() -> None:
    shapes = [(300, 784), (100, 300), (10, 100)]
    sizes = [math.prod(s) for s in shapes]
    low, high = erk(shapes, 0.01), erk(shapes, 0.1)
    assert sum(d * n for d, n in zip(low, sizes, strict=True)) == pytest.approx(0.01 * sum(sizes), abs=1e-9)
    assert sum(d * n for d, n in zip(high, sizes, strict=True)) == pytest.approx(0.1 * sum(sizes), abs=1e-9)
    assert low[2] / low[1] == pytest.approx((110 / 1000) / (400 / 30000))
    assert high[2] == 1
    assert high[1] / high[0] == pytest.approx((400 / 30000) / (1084 / 235200))


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    st.floats(1e-3, 1),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_erk_keeps_the_budget(shapes: list[list[int]], density: float, data: st.DataObject) -> None:
    sizes = [math.prod(s) for s in shapes]
    densities = erk(shapes, density)
    shares = [d * n for d, n in zip(densities, sizes, strict=True)]
    assert sum(shares) == pytest.approx(density * sum(sizes), rel=1e-9)
    assert all(0 < d <= 1 + 1e-9 for d in densities)
    counts = split_count(kept_count(density, sum(sizes)), shares)
    assert sum(counts) == kept_count(density, sum(sizes))
    assert all(0 <= c <= n and abs(c - s) < 1 + 1e-6 for c, n, s in zip(counts, sizes, shares, strict=True))
    assert erk([shapes[0]] * 3, density) == pytest.approx([density] * 3)
    assert erk(shapes, 1.0) == pytest.approx([1.0] * len(shapes))


def test_global_pruning_does_not_mind_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator) for s in ((7, 9), (4, 3, 3, 3), (11, 5))]
    masks = [torch.rand(w.shape, generator=generator) < 0.7 for w in weights]
    kept = prune(weights, masks, 60)
    backwards = prune(weights[::-1], masks[::-1], 60)[::-1]
    assert all(torch.equal(a, b) for a, b in zip(kept, backwards, strict=True))
    pool = torch.cat([w.abs()[m] for w, m in zip(weights, masks, strict=True)])
    assert set(torch.cat([w.abs()[k] for w, k in zip(weights, kept, strict=True)]).tolist()) == set(
        pool.topk(60).values.tolist()
    )


def test_a_tie_of_zeros_is_cut_exactly() -> None:
    mask = torch.ones(4, 5, dtype=torch.bool)
    assert [int(m.sum()) for m in prune([torch.zeros(4, 5)], [mask], 7)] == [7]


# --- state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["gradient", "random"])
def test_resumes_to_the_bit_from_a_file(growth: str) -> None:
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, GraNet, Callable[[], None]]:
        model = net(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, made(model, optimizer, growth=growth, seed=seed), stepper(model, optimizer)

    first, second = start(0), start(1)
    for _ in range(12):
        first[3]()
        first[2].step()
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first[:3]], file)
    file.seek(0)
    for part, state in zip(second[:3], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for _, _, granet, step in (first, second):
        for _ in range(20):
            step()
            granet.step()
        assert granet.t == 32
    assert equal(first[0].state_dict(), second[0].state_dict())
    assert equal(first[2].masks, second[2].masks)


def test_masks_are_in_the_model_and_in_the_schedule() -> None:
    model, _, granet, step = specimen(0)
    for _ in range(10):
        step()
        granet.step()
    by_model, by_schedule = specimen(1), specimen(2)
    by_model[0].load_state_dict(model.state_dict())
    by_schedule[2].load_state_dict(granet.state_dict())
    assert equal(by_model[2].masks, granet.masks)
    assert equal(by_schedule[2].masks, granet.masks)
    assert not bool(by_schedule[0].get_parameter("4.weight")[~granet.masks["4.weight"]].any())
    assert all(model.state_dict()[f"{n}_mask"].equal(m) for n, m in granet.masks.items())


def test_masks_outlive_the_schedule_as_zeros_or_as_torch_prunings() -> None:
    model, _, granet, step = specimen()
    for _ in range(20):
        step()
        granet.step()
    masks, x = {n: m.clone() for n, m in granet.masks.items()}, batch()[0]
    answer = model.eval()(x)
    granet.remove()
    assert torch.equal(model(x), answer)
    assert model.state_dict().keys() == net().state_dict().keys()
    with pytest.raises(ModelError, match=r"0\.weight is gone"):
        granet.step()
    model, _, granet, step = specimen()
    granet.load_state_dict({"t": 20, "generator": torch.Generator().get_state(), "masks": masks})
    granet.to_torch_prune()
    assert torch.nn.utils.prune.is_pruned(model)
    assert torch.equal(model.get_buffer("4.weight_mask").bool(), masks["4.weight"])


def test_works_as_the_scheduler_of_fit() -> None:
    model = net()
    optimizer = sgd(model)
    granet = made(model, optimizer, steps=(0, 6, 12), every=3)
    fit(model, batch(), supervised(cross_entropy), optimizer, scheduler=granet, steps=12, batch_size=8, progress=False)
    assert granet.t == 12
    assert granet.density == kept_count(0.1, 2074) / 2074


def test_digits_are_learned_at_a_tenth_of_the_weights() -> None:
    data = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    granet = made(model, optimizer, steps=(0, 150, 300), every=15)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        rows = torch.randint(len(data.train_x), (64,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(data.train_x[rows]), data.train_y[rows]).backward()
        optimizer.step()
        granet.step()
    assert granet.density == 0.1
    assert float((model(data.test_x).argmax(1) == data.test_y).float().mean()) > 0.9


# --- which weights -----------------------------------------------------------------------------------


def test_filters_kinds_and_what_stays_dense() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(30, 8)
            self.mix = nn.Conv1d(8, 8, 3, groups=2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.out = nn.Linear(8, 30)
            self.out.weight = self.words.weight  # tied

    model = Tagger()
    granet = made(model, sgd(model))
    assert list(granet.masks) == ["mix.weight", "attention.out_proj.weight", "out.weight"]
    assert granet.dense == ("attention.in_proj_weight",)
    granet.remove()
    both = made(model, sgd(model), kinds=(nn.Embedding, nn.Linear), where=lambda name, _: "attention" not in name)
    assert list(both.masks) == ["words.weight"]  # once, though two modules share it
    assert "mix.weight" in both.dense


def test_what_cannot_be_masked_is_named() -> None:
    model = net()
    with pytest.raises(ModelError, match="nothing to mask in Sequential"):
        made(model, sgd(model), where=lambda name, module: False)
    with pytest.raises(ModelError, match=r"0\.weight is not trained"):
        made(model, torch.optim.SGD(model[4].parameters(), lr=0.1))
    parametrizations.weight_norm(model[4])
    with pytest.raises(ModelError, match=r"4\.weight is parametrised"):
        made(model, sgd(model))
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ModelError, match=r"0\.weight has no shape yet"):
        made(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1))
    taken = net()
    made(taken, sgd(taken))
    with pytest.raises(ModelError, match=r"0\.weight is masked already"):
        made(taken, sgd(taken))


def test_a_missing_or_infinite_gradient_is_named() -> None:
    model = net()
    optimizer = sgd(model)
    granet = made(model, optimizer, every=1)
    with pytest.raises(ModelError, match=r"0\.weight has no gradient at step 1"):
        granet.step()
    stepper(model, optimizer)()
    weight = model.get_parameter("4.weight")
    assert weight.grad is not None
    weight.grad[0, 0] = math.inf
    with pytest.raises(ModelError, match=r"gradient of 4\.weight is not finite"):
        granet.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": (0.5, 0.0)}, "0 < final"),
        ({"density": (0.1, 0.5)}, "final <= initial"),
        ({"density": (1.5, 0.5)}, "initial <= 1"),
        ({"density": (1.0, 1e-5)}, "keeps none"),
        ({"steps": (20, 20, 40)}, "t0 < t_f"),
        ({"steps": (0, 50, 40)}, "t_f <= T"),
        ({"every": 0}, "1 or more"),
        ({"prune_rate": 1.1}, "expected a share"),
        ({"growth": "momentum"}, "'gradient' or 'random'"),
        ({"scope": "layer"}, "'global' or 'uniform'"),
        ({"scope": "uniform"}, "init='uniform'"),
        ({"scope": "uniform", "density": (1.0, 0.005)}, "spares"),
        ({"scope": "uniform", "init": "uniform", "classifier": "head"}, "no masked module"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        made(model, sgd(model), **options)
    assert not any("mask" in name for name in model.state_dict())


def test_warnings_of_few_updates_and_of_emptied_tensors() -> None:
    model = net()
    with pytest.warns(UserWarning, match="fewer than two updates"):
        made(model, sgd(model), every=30)
    model = net()
    optimizer = sgd(model)
    granet = GraNet.one_shot(model, optimizer, density=0.2, at=1)
    model[6].weight.data.mul_(1e-6)
    stepper(model, torch.optim.SGD(model.parameters(), lr=0.0))()
    with pytest.warns(UserWarning, match=r"no connection in 6\.weight"):
        granet.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        granet.step()


def test_a_state_of_another_model_is_refused() -> None:
    granet = specimen()[2]
    state = granet.state_dict()
    state["masks"]["6.weight"] = state["masks"]["6.weight"][:2]
    with pytest.raises(ValueError, match=r"6\.weight differ"):
        granet.load_state_dict(state)


# --- plasticity --------------------------------------------------------------------------------------


def trained() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module], Tensor]]:
    model = net()
    optimizer = sgd(model)
    step = stepper(model, optimizer)
    for _ in range(10):
        step()
    x, y = batch()
    return model, optimizer, lambda m: cross_entropy(m(x), y)


def measured(fraction: float, **options: object) -> Plasticity:
    model, optimizer, loss = trained()
    before = copy.deepcopy(model.state_dict())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        step = stepper(model, optimizer)
        for _ in range(5):
            step()

    def evaluate(model: nn.Module) -> float:
        return -float(loss(copy.deepcopy(model).eval()).detach())

    given: dict = {"loss": loss} if options.get("regrow", "none") != "none" else {}
    found = pruning_plasticity(model, optimizer, train, evaluate, fraction, **given | options)
    assert equal(before, model.state_dict())
    assert found.plasticity == found.after - found.before
    return found


def test_pruning_nothing_is_training_on() -> None:
    found = measured(0.0)
    model, optimizer, loss = trained()
    assert found.before == found.pruned == pytest.approx(-float(loss(copy.deepcopy(model).eval()).detach()))
    step = stepper(model, optimizer)
    for _ in range(5):
        step()
    assert equal(found.model.state_dict(), model.state_dict())
    assert found.density == 1


@pytest.mark.parametrize("criterion", ["global", "uniform", "structured"])
def test_what_is_pruned_stays_away(criterion: str) -> None:
    found = measured(0.8, criterion=criterion)
    weights = {n: found.model.get_parameter(f"{n}.weight") for n in (0, 4, 6)}
    there = {n: int((w != 0).sum()) for n, w in weights.items()}
    if criterion == "global":
        assert sum(there.values()) == kept_count(0.2, 2074) == round(found.density * 2074)
    elif criterion == "uniform":
        assert there == {0: 10, 4: 384, 6: 20}
    else:
        filters = {n: int(w.detach().flatten(1).any(1).sum()) for n, w in weights.items()}
        assert filters == {0: 1, 4: 4, 6: 1}
    assert found.pruned < found.before


@pytest.mark.parametrize("criterion", ["global", "uniform", "structured"])
def test_regrowth_gives_back_what_it_says(criterion: str) -> None:
    plain = measured(0.8, criterion=criterion)
    back = measured(0.8, criterion=criterion, regrow="pruned")
    exchanged = measured(0.8, criterion=criterion, regrow="exchange", rate=0.4)
    assert back.density == 1
    assert exchanged.density == plain.density
    assert back.pruned == plain.pruned  # what has grown starts at zero
    assert exchanged.after != plain.after


def test_a_sparse_network_is_pruned_of_what_is_there() -> None:
    model, optimizer, granet, step = specimen()
    for _ in range(20):
        step()
        granet.step()
    found = pruning_plasticity(model, optimizer, lambda m, o: None, lambda m: 0.0, 0.5)
    assert found.density == kept_count(0.5, kept_count(0.1, 2074)) / 2074
    mask = found.model.get_buffer("4.weight_mask")
    assert not bool((mask & ~granet.masks["4.weight"]).any())
    assert 0 < int(mask.sum()) < granet.counts["4.weight"]


def test_bad_questions_about_plasticity_are_refused() -> None:
    with pytest.raises(ValueError, match="fraction"):
        measured(1.0)
    with pytest.raises(ValueError, match="criterion"):
        measured(0.5, criterion="size")
    with pytest.raises(ValueError, match="expected 'none'"):
        measured(0.5, regrow="all")
    with pytest.raises(ValueError, match="needs `loss"):
        measured(0.5, regrow="pruned", loss=None)
    with pytest.raises(ModelError, match=r"does not reach 0\.weight"):
        measured(0.5, regrow="pruned", loss=lambda m: m[6].weight.sum() + m[4].weight.sum())
