"""Clips, folding, equalisation, splitting, bias correction, learned rounding: what is exact, what must not worsen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from neuropil.compress.quantize import (
    QuantizationError,
    Quantizer,
    absorb_bias,
    aciq_clip,
    bake_folded,
    correct_bias,
    correct_bias_from,
    equalise,
    fold,
    fold_qat,
    learn_rounding,
    omse,
    quantize_model,
    report,
    split_outliers,
)
from neuropil.compress.quantize.correction import relu_mean
from neuropil.compress.quantize.folding import FoldedNorm
from neuropil.compress.quantize.ranges import aciq_factor
from neuropil.compress.reconstruction import output_error, walk
from neuropil.models import load_packed, save_packed
from neuropil.packed import is_packed, nbytes, packed_modules


def net(seed: int = 0) -> nn.Sequential:
    """A trained-looking network: norms with statistics of their own, a depthwise convolution, uneven channels."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)),
    )
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(10 ** (torch.rand(len(module.weight)) - 0.5))
                module.bias.copy_(torch.randn(len(module.bias)))
        model[3].weight.mul_(10 ** (torch.rand(8, 1, 1, 1) * 2 - 1))
        for _ in range(60):
            model.train()(images(32, seed=None))
    return model.eval()


def images(count: int = 64, seed: int | None = 5) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator)


def size(module: nn.Module) -> Tensor:
    return module.weight.detach().flatten(1).abs().amax(1)


# ------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("density", ["gauss", "laplace"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_clip_is_the_minimum_of_the_cost(density: str, bits: int) -> None:
    """By quadrature of the cost on a grid of clips."""
    x = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    f = torch.exp(-x) / 2 if density == "laplace" else torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    factor = aciq_factor(bits, density)

    def cost(a: float) -> float:
        return float(2 * ((x - a).clamp_min(0) ** 2 * f).sum() * (x[1] - x[0]) + a * a / (3 * 4**bits))

    assert cost(factor) < min(cost(0.98 * factor), cost(1.02 * factor))


def test_clips_of_known_densities() -> None:
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(1, 1, 200_000, generator=generator)
    uniform = torch.rand(1, 1, 200_000, generator=generator) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-9).log()
    for x, factor in ((gauss, aciq_factor(4, "gauss")), (laplace, aciq_factor(4, "laplace"))):
        assert aciq_clip(2 * x, 4).item() == pytest.approx(2 * factor, rel=0.01)
        low = Quantizer(4, observer="aciq")
        least = Quantizer(4, observer="minmax")
        assert (low(x) - x).square().mean() < 0.5 * (least(x) - x).square().mean()
    # what a ReLU leaves: the factor of one more bit
    assert aciq_clip(laplace.relu(), 3, True).item() == pytest.approx(aciq_factor(4, "laplace"), rel=0.01)
    q = Quantizer(3, "affine", observer="aciq")
    q(laplace.relu())
    assert q.grid.scale.item() * 7 == pytest.approx(aciq_factor(4, "laplace"), rel=0.01)
    with pytest.raises(QuantizationError, match="density"):
        aciq_factor(4, "cauchy")


def test_omse_is_never_worse_than_the_whole_range() -> None:
    w = torch.randn(8, 100)
    w[:, 0] = 8
    least, whole = Quantizer(**omse(4)), Quantizer(4, granularity="channel")
    assert bool(((least(w) - w).square().mean(1) <= (whole(w) - w).square().mean(1)).all())


# ------------------------------------------------------------------------------------------------------ folding


def test_folded_norms_leave_the_function() -> None:
    """Invariant 9."""
    model, x = net(), images()
    before = copy.deepcopy(model.state_dict())
    changes, statistics = fold(model)
    assert changes.changed == ("0", "3", "7")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in changes.model.modules())
    torch.testing.assert_close(changes.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.testing.assert_close(statistics["3"][0], model[4].bias)
    given = fold(model, [("0", "1"), ("3", "4")])[0]
    assert given.left == {"8": "no layer alone feeds this norm"}
    torch.testing.assert_close(given.model(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_norm_whose_layer_others_read_is_left() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            return self.norm(out) + out

    changes, _ = fold(Branch().eval())
    assert not changes.changed
    assert "norm" in changes.left

    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(QuantizationError, match="name the pairs"):
        fold(Deciding())


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Linear])
def test_other_layers_fold_too(kind: Any) -> None:
    torch.manual_seed(0)
    layer, norm = (kind(4, 6, 3), nn.BatchNorm2d(6)) if kind is not nn.Linear else (kind(4, 6), nn.BatchNorm1d(6))
    model, x = nn.Sequential(layer, norm), torch.randn(16, 4, *([5, 5] if kind is not nn.Linear else []))
    model(x)
    torch.testing.assert_close(fold(model)[0].model(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_folding_in_training() -> None:
    """Without rounding it trains as layer and norm do; frozen, as the folded layer; baked, to the bit."""
    model, x = net(), images()
    same = fold_qat(model, {"bits": 16, "granularity": "channel", "dynamic": True}).model
    out, plain = same.train()(x), copy.deepcopy(model).train()(x)
    torch.testing.assert_close(out, plain, rtol=2e-3, atol=2e-3)
    made = fold_qat(model, {"bits": 4, "granularity": "channel", "dynamic": True}, delay=2)
    assert set(made.changed) == {"0", "3", "7", "11", "13"}
    assert not made.left
    folded = made.model[0]
    assert isinstance(folded, FoldedNorm)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.01)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        made.model.train()(x).square().mean().backward()
        optimizer.step()
        seen.append((bool(folded.frozen), folded.norm.running_mean.clone()))
    assert [frozen for frozen, _ in seen] == [False, False, True, True]
    assert torch.equal(seen[2][1], seen[3][1])
    assert not torch.equal(seen[0][1], seen[1][1])
    torch.testing.assert_close(made.model.train()(x), made.model.eval()(x))
    baked = bake_folded(made.model)
    torch.testing.assert_close(baked.model(x), made.model(x), rtol=0, atol=0)
    assert all(is_packed(baked.model.get_submodule(name)) for name in ("0", "3", "7", "11", "13"))
    assert not any(isinstance(m, nn.BatchNorm2d | FoldedNorm) for m in baked.model.modules())


def test_activations_are_rounded_in_folded_training() -> None:
    made = fold_qat(net(), {"bits": 8}, activations={"bits": 8, "dynamic": True, "scheme": "affine"})
    baked = bake_folded(made.model)
    torch.testing.assert_close(baked.model(images()), made.model.eval()(images()), rtol=0, atol=0)
    assert baked.model[3].input_quantizer.bits == 8


# ------------------------------------------------------------------------------------------------- equalisation


def test_equalisation_leaves_the_function_and_makes_ranges_equal() -> None:
    """Invariant 8."""
    folded, statistics = fold(net())
    plain, x = folded.model, images()
    changes = equalise(plain, statistics=statistics)
    assert set(changes.changed) == {"0", "3", "7", "11", "13"}
    torch.testing.assert_close(changes.model(x), plain(x), rtol=1e-4, atol=1e-5)
    model = changes.model
    theirs = model[7].weight.detach().abs().amax((0, 2, 3))
    torch.testing.assert_close(size(model[3]), theirs, rtol=0.02, atol=1e-6)
    torch.testing.assert_close(size(model[0]), model[3].weight.detach().abs().amax((1, 2, 3)), rtol=0.02, atol=1e-6)
    flat = model[11].weight.detach().abs().reshape(16, 6, 4).amax((0, 2))  # four pixels of each channel
    torch.testing.assert_close(size(model[7]), flat, rtol=0.02, atol=1e-6)
    # the statistics are still those of what the layers answer
    seen = torch.cat([c.output for c in next(walk(plain, ["3"], [x])).calls])
    again = torch.cat([c.output for c in next(walk(model, ["3"], [x])).calls])
    ratio = again.std((0, 2, 3)) / seen.std((0, 2, 3))
    torch.testing.assert_close(statistics["3"][1] / fold(net())[1]["3"][1], ratio, rtol=1e-3, atol=1e-4)


def test_dead_channels_and_given_pairs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    for pairs in (None, [("0", "2")]):
        made = equalise(model, pairs).model
        assert all(torch.isfinite(p).all() for p in made.parameters())
        torch.testing.assert_close(made(torch.ones(2, 4)), model(torch.ones(2, 4)))
    with pytest.raises(QuantizationError, match="ReLU"):
        equalise(model, [("0", "1")])
    assert not equalise(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))).changed


def test_a_residual_branch_is_not_scaled() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            return self.c(self.b(h).relu()) + h

    torch.manual_seed(0)
    model, x = Residual(), torch.randn(3, 4)
    changes = equalise(model)
    assert set(changes.changed) == {"b", "c"}
    assert set(changes.left) == {"a"}
    torch.testing.assert_close(changes.model(x), model(x))


def test_absorbed_biases_leave_activations_above_the_floor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].bias.fill_(20.0)
    statistics = {"0": (torch.full((6,), 20.0), torch.ones(6))}
    changes = absorb_bias(model, statistics)
    x = 0.3 * torch.randn(10, 4)
    torch.testing.assert_close(changes.model(x), model(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(statistics["0"][0], torch.full((6,), 3.0))
    assert changes.model[0].bias.abs().max() < 4


@pytest.mark.parametrize("share", [0.05, 0.6, 1.0])
def test_splitting_leaves_the_function_and_halves_outliers(share: float) -> None:
    """Invariant 8."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        model[4].weight[0, 7] = 9
    x = torch.randn(2, 3, 8, 8)
    changes = split_outliers(model, share)
    assert changes.changed == ("0", "4")
    assert "groups" in changes.left["2"]
    torch.testing.assert_close(changes.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert changes.model[4].layer.weight.abs().max() <= 4.5
    assert changes.model[4].layer.in_features == 64 + -(-64 * share // 1)
    rounded = quantize_model(changes.model, {"bits": 4}).model
    whole = quantize_model(model, {"bits": 4}).model
    assert (rounded(x) - model(x)).square().mean() < (whole(x) - model(x)).square().mean()
    with pytest.raises(QuantizationError, match="share"):
        split_outliers(model, 0.0)


# --------------------------------------------------------------------------------------------- bias correction


def test_corrected_biases_leave_no_mean_error() -> None:
    """Invariant 11, of every layer and on the whole."""
    plain = fold(net())[0].model
    data = [images(48, 1), images(16, 2)]
    rough = quantize_model(plain, {"bits": 3}).model
    changes = correct_bias(rough, plain, data)
    assert set(changes.changed) == {"0", "3", "7", "11", "13"}
    for seen in walk(plain, list(changes.changed), data, inputs_from=changes.model):
        layer = changes.model.get_submodule(seen.name)
        error = torch.cat([layer(*c.args) - c.output for c in seen.calls]).movedim(1, -1).flatten(0, -2).mean(0)
        assert error.abs().max() < 1e-5
    x = torch.cat(data)
    assert (changes.model(x) - plain(x)).mean(0).abs().max() < 1e-5
    assert (rough(x) - plain(x)).mean(0).abs().max() > 1e-2
    with pytest.raises(QuantizationError, match="packed"):
        correct_bias(plain, plain, data)


def test_layers_without_a_bias_are_left_or_given_one() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)), torch.rand(32, 4)
    rough = quantize_model(plain, {"bits": 2}).model
    assert "no bias" in correct_bias(rough, plain, [x]).left["0"]
    assert correct_bias(rough, plain, [x], add=True).changed == ("0", "2")
    assert correct_bias(rough, plain, [x], skip=["2"]).left["2"] == "skipped as asked"


def test_correction_from_norms_is_that_of_their_gaussians() -> None:
    """On inputs drawn from the very Gaussians, the mean error is gone."""
    torch.manual_seed(0)
    mean, deviation = torch.randn(64), torch.rand(64) + 0.5
    x = (mean + deviation * torch.randn(200_000, 64)).relu()
    torch.testing.assert_close(relu_mean(mean, deviation), x.mean(0), rtol=0.02, atol=0.01)
    plain = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 8))
    rough = quantize_model(plain, {"bits": 2}).model
    made = correct_bias_from(rough, plain, {"0": (mean, deviation)})
    assert made.changed == ("2",)
    wanted = plain[2](x).mean(0)
    assert (made.model[2](x).mean(0) - wanted).abs().max() < 0.01
    assert (rough[2](x).mean(0) - wanted).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------- learned rounding


@pytest.mark.parametrize("method", ["adaround", "adaquant"])
def test_learned_rounding_is_no_worse_than_nearest(method: str) -> None:
    """Invariant 12."""
    plain, data = fold(net())[0].model, [images(64)]
    how: dict[str, Any] = {"bits": 3, "granularity": "channel", "observer": "mse"}
    nearest = quantize_model(plain, how).model
    before = torch.get_rng_state()
    settings: dict[str, Any] = {"steps": 150, "lr": 1e-2, "rounded_inputs": False, "method": method}
    made = learn_rounding(plain, how, data, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert made.changed == ("0", "3", "7", "11", "13")
    better = 0
    for seen in walk(plain, list(made.changed), data):
        relu = seen.name != "13"

        def error(model: nn.Module, seen: Any = seen, relu: bool = relu) -> float:
            layer = model.get_submodule(seen.name)
            return output_error(lambda x: layer(x).relu() if relu else layer(x), seen, _relu_error if relu else _error)

        assert error(made.model) <= error(nearest) * (1 + 1e-5)
        better += error(made.model) < 0.9 * error(nearest)
        if method == "adaround":
            mine, base = made.model.get_submodule(seen.name).packing, nearest.get_submodule(seen.name).packing
            torch.testing.assert_close(mine.scale, base.scale)
            at = plain.get_submodule(seen.name).weight.flatten(1) / mine.scale + 4
            codes = mine.integers().flatten(1)
            up = at.detach().floor().clamp(0, 7), at.detach().ceil().clamp(0, 7)
            assert bool(((codes == up[0]) | (codes == up[1])).all())
    assert better >= 3
    x = images(64, 9)
    assert (made.model(x) - plain(x)).square().mean() < (nearest(x) - plain(x)).square().mean()


def _relu_error(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted.relu()).square().mean()


def _error(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).square().mean()


def test_blocks_of_a_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).eval()
    ids = [torch.randint(50, (4, 9)) for _ in range(2)]
    how: dict[str, Any] = {"bits": 3, "granularity": "channel"}
    blocks = [f"model.layers.{k}" for k in range(2)]

    def loss(out: Any) -> Tensor:
        return nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[0][:, 1:].flatten())

    weighted = learn_rounding(model, how, ids, blocks=blocks, steps=5, lr=1e-2, loss=loss)
    made = learn_rounding(model, how, ids, blocks=blocks, steps=150, lr=3e-2)
    assert weighted.changed == made.changed
    assert set(made.left) == {"model.embed_tokens", "lm_head"}
    assert len(made.changed) == 14
    nearest = quantize_model(model, how, skip=["lm_head"]).model
    last = list(walk(model, blocks, ids, inputs_from=made.model))[-1]
    base = list(walk(model, blocks, ids, inputs_from=nearest))[-1]
    assert output_error(made.model.model.layers[1], last) < output_error(nearest.model.layers[1], base)
    save_packed(made.model, tmp_path / "small")
    again = load_packed(tmp_path / "small", LlamaForCausalLM(config))
    with torch.no_grad():
        assert torch.equal(again(ids[0]).logits, made.model(ids[0]).logits)
    with pytest.raises(QuantizationError, match="no layer"):
        learn_rounding(model, how, ids, blocks=["model.norm"], steps=1)


def test_what_learned_rounding_leaves_and_refuses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    ids = [torch.randint(10, (8,))]
    made = learn_rounding(model, {"0": {"bits": 4}, "1": {"bits": 4}}, ids, steps=5)
    assert made.changed == ("0", "1")
    assert "no pattern" in made.left["2"]
    with pytest.raises(QuantizationError, match="uniform"):
        learn_rounding(model, {"bits": 2, "scheme": "ternary"}, ids)
    with pytest.raises(ValueError, match="empty"):
        learn_rounding(model, "int4", [])
    with pytest.raises(QuantizationError, match="method"):
        learn_rounding(model, "int4", ids, method="dice")
    with pytest.raises(QuantizationError, match="compressed already"):
        learn_rounding(made.model, "int4", ids)


def test_what_is_made_is_kept_on_disk(tmp_path: Path) -> None:
    model, x = net(), images()
    plain = fold(model)[0].model
    made = correct_bias(learn_rounding(plain, "int4", [x], steps=5).model, plain, [x]).model
    save_packed(made, tmp_path / "small")
    assert torch.equal(load_packed(tmp_path / "small", fold(net(1))[0].model)(x), made(x))


def test_the_report_says_what_happened() -> None:
    model, x = fold(net())[0].model, images()
    changes = quantize_model(model, {"bits": 4, "granularity": "channel"}, skip=["13"])
    found = report(model, changes, [x])
    rows = {row.name: row for row in found.layers}
    assert found.bytes == sum(nbytes(p) for _, _, p in packed_modules(changes.model)) + 16 * 5 * 4
    w, q = model[11].weight, changes.model[11].weight
    assert rows["11"].weight_error == pytest.approx(float((w - q).square().sum() / w.square().sum()), rel=1e-4)
    wanted, made = model[:12](x), changes.model[:12](x)
    error = float((made - wanted).square().sum() / wanted.square().sum())
    assert rows["11"].output_error == pytest.approx(error, rel=1e-4)
    assert rows["13"].left == "skipped as asked"
    assert rows["13"].bits == 32
    assert "skipped as asked" in str(found)
    assert report(model, changes).layers[0].output_error is None
