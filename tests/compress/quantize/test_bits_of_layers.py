"""Sensitivities, curvature, costs, choices of bits, distillation, and quantization without data."""

import pytest
import torch
from torch import Tensor, nn

from neuropil.compress.quantize import (
    LSQ,
    BitBranches,
    QuantizationError,
    Quantizer,
    bake,
    bit_allocation,
    bit_search,
    bops_costs,
    curvature,
    dfq,
    distil_data,
    distillation,
    fold,
    hessian_traces,
    operations,
    qat_prepare,
    quantize_model,
    recipe,
    roofline_costs,
    sensitivity,
    size_costs,
    soft_loss,
    top_eigenvalues,
    train_without_data,
)
from neuropil.packed import nbytes, packed_modules
from neuropil.training import fit, supervised


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3))


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 1, 8, 8, generator=generator), torch.randint(3, (32,), generator=generator)


# ----------------------------------------------------------------------------------------------------- curvature


def test_trace_and_eigenvalue_of_a_known_quadratic() -> None:
    """Invariant 13: a rotated diag(1..10), which has off-diagonal terms for the probes to average out."""
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(10, 10)).Q
    h = rotation @ torch.diag(torch.arange(1.0, 11.0)) @ rotation.T
    w = nn.Parameter(torch.randn(10))
    other = nn.Parameter(torch.randn(3))

    def loss() -> Tensor:
        return 0.5 * w @ h @ w + other.square().sum() + w[:3] @ other

    traces = hessian_traces(loss, {"w": w, "other": other}, probes=1000)
    assert float(traces["w"]) * 10 == pytest.approx(55, rel=0.03)
    assert float(traces["other"]) == pytest.approx(2, rel=0.05)
    tops = top_eigenvalues(loss, {"w": w, "other": other}, steps=200)
    assert float(tops["w"]) == pytest.approx(10, rel=1e-3)
    assert float(tops["other"]) == pytest.approx(2, rel=1e-3)
    with pytest.raises(QuantizationError, match="linear"):
        hessian_traces(lambda: w.sum(), {"w": w})


def test_curvature_of_layers_is_that_of_the_exact_hessian() -> None:
    model, data = net(), batch()
    loss = supervised(nn.functional.cross_entropy)
    found = curvature(model, loss, [data], probes=300)
    assert set(found) == {"0", "3", "5"}
    last = model[5]
    before = model[:5](data[0]).detach()

    def at(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(before @ w.T + last.bias, data[1])

    exact = torch.autograd.functional.hessian(at, last.weight.detach()).reshape(48, 48)
    assert found["5"] == pytest.approx(float(exact.trace()) / 48, rel=0.1)
    tops = curvature(model, loss, [data], what="eigenvalue", probes=60)
    assert tops["5"] == pytest.approx(float(torch.linalg.eigvalsh(exact).max()), rel=0.02)
    assert model[0].weight.grad is None
    with pytest.raises(QuantizationError, match="no batch"):
        curvature(model, loss, [])
    with pytest.raises(QuantizationError, match="expected"):
        curvature(model, loss, [data], what="norm")


# ------------------------------------------------------------------------------------------------- costs and harm


def test_sensitivities() -> None:
    model, data = net(), batch()
    plain = sensitivity(model, (2, 4))
    q = Quantizer(2, "symmetric", "channel", observer="mse")
    assert plain["3"][2] == pytest.approx(float((q(model[3].weight) - model[3].weight).square().sum()), rel=1e-5)
    weighted = sensitivity(model, (2, 4), curvature={"0": 2.0, "3": -1.0, "5": 0.5})
    assert weighted["0"][4] == pytest.approx(2 * plain["0"][4])
    assert weighted["3"] == {2: 0.0, 4: 0.0}

    def loss(m: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(m(data[0]), model(data[0]).argmax(1))

    measured = sensitivity(model, (2, 8), loss=loss)
    one = quantize_model(model, recipe({"3": 2})).model
    assert measured["3"][2] == pytest.approx(float(loss(one) - loss(model)), rel=1e-3, abs=1e-5)
    assert abs(measured["3"][8]) < abs(measured["3"][2])
    assert torch.equal(net()[3].weight, model[3].weight)


def test_costs_are_those_of_what_is_made() -> None:
    model = net()
    sizes, bits = size_costs(model), {"0": 3, "3": 2, "5": 8}
    made = quantize_model(model, recipe(bits)).model
    assert {n: nbytes(p) for n, _, p in packed_modules(made)} == {n: sizes[n][b] for n, b in bits.items()}
    macs = operations(model, batch()[0])
    assert macs == {"0": 4 * 36 * 9, "3": 144 * 16, "5": 48}
    assert operations(nn.Sequential(nn.ConvTranspose1d(2, 3, 2)), torch.zeros(4, 2, 5)) == {"0": 5 * 2 * 3 * 2}
    assert bops_costs(macs, (4,), 8)["3"] == {4: 144 * 16 * 32}
    line = roofline_costs(macs, sizes, speed=dict.fromkeys((2, 3, 4, 6, 8), 1e3), bandwidth=1e12)
    assert line["5"][2] == pytest.approx(48 / 1e3)
    line = roofline_costs(macs, sizes, speed=dict.fromkeys((2, 3, 4, 6, 8), 1e12), bandwidth=10)
    assert line["5"][2] == pytest.approx(sizes["5"][2] / 10)
    with pytest.raises(QuantizationError, match="no speed"):
        roofline_costs(macs, sizes, speed={2: 1.0}, bandwidth=1)


def tables(seed: int) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, 3, 3, generator=generator).tolist()
    names, bits = "abcd", (2, 4, 8)
    harm = {n: {b: draw[k][0][j] / b for j, b in enumerate(bits)} for k, n in enumerate(names)}
    cost = {n: {b: (1 + draw[k][1][0]) * b for b in bits} for k, n in enumerate(names)}
    other = {n: {b: (1 + draw[k][2][0]) * b * b for b in bits} for k, n in enumerate(names)}
    return harm, cost, other


@pytest.mark.parametrize("seed", range(12))
def test_the_integer_program_is_as_good_as_trying_all(seed: int) -> None:
    """Invariant 13: four layers of three numbers of bits; with one budget and with two."""
    harm, cost, other = tables(seed)
    for tables_, budgets in ((cost, 24.0), ([cost, other], [28, 120.0])):
        best = bit_allocation(harm, tables_, budgets, "exhaustive")
        found = bit_allocation(harm, tables_, budgets)
        total = {name: sum(harm[n][b] for n, b in bits.items()) for name, bits in (("all", best), ("ilp", found))}
        assert total["ilp"] == pytest.approx(total["all"])
        greedy = bit_allocation(harm, tables_, budgets, "greedy")
        assert sum(harm[n][b] for n, b in greedy.items()) >= total["all"] - 1e-12
        for bits in (best, found, greedy):
            assert sum(cost[n][b] for n, b in bits.items()) <= 28


def test_searches_find_the_best() -> None:
    harm, cost, _ = tables(3)

    def score(bits: dict[str, int]) -> float:
        assert sum(cost[n][b] for n, b in bits.items()) <= 24
        return -sum(harm[n][b] for n, b in bits.items())

    best = bit_search(score, cost, 24, "exhaustive")
    assert best == bit_allocation(harm, cost, 24)
    for method in ("evolution", "reinforce"):
        found = bit_search(score, cost, 24, method, tries=200)
        assert score(found) >= score(best) - 0.02
        assert found == bit_search(score, cost, 24, method, tries=200)


def test_impossible_budgets_are_refused() -> None:
    harm, cost, _ = tables(0)
    with pytest.raises(QuantizationError, match="below the least"):
        bit_allocation(harm, cost, 1)
    with pytest.raises(QuantizationError, match="below the least"):
        bit_search(lambda bits: 0.0, cost, 1)
    with pytest.raises(QuantizationError, match="lack"):
        bit_allocation(harm, {"a": cost["a"]}, 10)
    with pytest.raises(QuantizationError, match="method"):
        bit_allocation(harm, cost, 100, "luck")
    many = {str(k): {2: 1.0, 4: 2.0} for k in range(25)}
    with pytest.raises(QuantizationError, match="too many"):
        bit_allocation(many, many, 100, "exhaustive")
    with pytest.raises(QuantizationError, match="not both"):
        sensitivity(net(), loss=lambda m: 0.0, curvature={})


def test_branches_learn_how_many_bits() -> None:
    """A penalty on bits drives layers to few, the loss to many; what is packed is the likeliest branch."""
    model, (x, _) = net(), batch()
    wanted = model(x).detach()
    for price, expected in ((10.0, 2), (0.0, 8)):
        made = qat_prepare(model, BitBranches((2, 4, 8))).model
        branches = [m for m in made.modules() if isinstance(m, BitBranches)]
        assert len(branches) == 3
        optimizer = torch.optim.Adam([b.alpha for b in branches], lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            cost = torch.stack([b.expected_cost({2: 0.2, 4: 0.4, 8: 0.8}) for b in branches]).sum()
            ((made(x) - wanted).square().mean() + price * cost).backward()
            optimizer.step()
        assert [b.bits for b in branches] == [expected] * 3
        packed = bake(made).model
        levels = {p.constants["levels"] for _, _, p in packed_modules(packed)}
        assert levels == {2**expected}


# --------------------------------------------------------------------------------------------------- distillation


def test_the_loss_is_its_closed_form() -> None:
    s, t = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    p, q = (t / 3).softmax(1), (s / 3).softmax(1)
    torch.testing.assert_close(soft_loss(s, t, 3.0), 9 * (p * (p / q).log()).sum(1).mean())
    teacher, student, (x, y) = net(1).eval(), net(2), batch()
    made = distillation(teacher, weight=0.3, temperature=2.0, features=["3"], feature_weight=0.5)(student, (x, y))
    ce = nn.functional.cross_entropy(student(x), y)
    features = (student[:4](x) - teacher[:4](x)).square().mean()
    torch.testing.assert_close(made, 0.7 * ce + 0.3 * soft_loss(student(x), teacher(x), 2.0) + 0.5 * features)
    assert teacher[0].weight.grad is None
    with pytest.raises(QuantizationError, match="without labels"):
        distillation(teacher)(student, (x,))
    with pytest.raises(QuantizationError, match="expected"):
        distillation(teacher, weight=2.0)


def test_distillation_with_features_trains_through_fit() -> None:
    teacher, data = net(0), batch()
    student = qat_prepare(teacher, LSQ(2, granularity="channel")).model
    loss = distillation(teacher, weight=1.0, features=["3"])
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    run = fit(student, (data[0],), loss, optimizer, steps=40, progress=False)
    assert run.losses[-1] < run.losses[0] / 2


# -------------------------------------------------------------------------------------------------- without data


def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """Three classes told apart by where a bright square lies; a network with norms that has learnt them."""
    torch.manual_seed(0)
    y = torch.arange(384) % 3
    x = 0.3 * torch.randn(384, 1, 8, 8) + 2
    for k in range(3):
        x[y == k, :, 2 * k : 2 * k + 3, 1:5] += 1.5
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(128, 3)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    fit(model, (x, y), supervised(nn.functional.cross_entropy), optimizer, epochs=8, progress=False)
    return model.eval(), x, y


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_made_up_data_look_like_real_ones_to_the_norms() -> None:
    model, x, _ = trained()
    like = (float(x.mean()), float(x.std()))
    before = torch.get_rng_state()
    made = distil_data(model, (1, 8, 8), 32, steps=150, input_statistics=like, limits=(0.0, 6.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert made.shape == (32, 1, 8, 8)
    assert 0 <= float(made.min()) <= float(made.max()) <= 6

    def apart(x: Tensor) -> float:
        out, total = x, 0.0
        for module in model[:5]:
            if isinstance(module, nn.BatchNorm2d):
                total += float((out.mean((0, 2, 3)) - module.running_mean).square().sum())
                total += float((out.std((0, 2, 3)) - module.running_var.sqrt()).square().sum())
            out = module(out).detach()
        return total

    assert apart(made) < 0.1 * apart(like[0] + like[1] * torch.randn(32, 1, 8, 8))
    assert not model[1].training
    with pytest.raises(QuantizationError, match="nothing to match"):
        distil_data(net(), (1, 8, 8))


def test_data_free_quantization_and_training() -> None:
    model, x, y = trained()
    assert right(model, x, y) > 0.98
    changes = dfq(model, {"bits": 8})
    assert changes.changed == ("0", "3", "7")
    assert right(changes.model, x, y) > 0.95
    made = distil_data(model, (1, 8, 8), 64, steps=100, input_statistics=(float(x.mean()), float(x.std())))
    plain = fold(model)[0].model
    binary = Quantizer(1, "binary", "channel", dynamic=True)
    rough = quantize_model(plain, binary).model
    learned = train_without_data(plain, binary, made, epochs=20)
    assert learned.changed == ("0", "3", "7")
    assert right(learned.model, x, y) > max(0.9, right(rough, x, y))
    eight = {"bits": 8, "scheme": "affine"}
    both = train_without_data(model, LSQ(4, granularity="channel"), made, activations=eight, epochs=2)
    assert right(both.model, x, y) > 0.9
    for name in ("1", "4"):
        ours, theirs = both.model.get_submodule(name), model.get_submodule(name)
        assert torch.equal(ours.running_mean, theirs.running_mean)
