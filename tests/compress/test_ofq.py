"""OFQ: the sheet's invariants of StatsQ, LSQ, QKR, CGA and the counter, and whole transformers, packed."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import integrate
from tiny_models import llama
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from neuropil.compress import (
    CGA,
    LsqActivation,
    OscillationTracker,
    QKRAttention,
    StatsQuantizer,
    ofq_bake,
    ofq_quantize,
)
from neuropil.compress.ofq import distillation_loss
from neuropil.compress.ofq_attention import QueryKey
from neuropil.compress.ofq_models import latents, merge_query_keys
from neuropil.compress.oscillation import IterativeFreezing, dampening
from neuropil.compress.quantize import LSQ, QuantizationError, qat_prepare, quantize_model
from neuropil.models.packed_files import load_packed, save_packed
from neuropil.packed import nbytes, packed_modules

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}


def vit(seed: int = 0) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return _alive(ViTForImageClassification(ViTConfig(**SIZES, **IMAGES)))


def deit(seed: int = 0) -> DeiTForImageClassificationWithTeacher:
    torch.manual_seed(seed)
    return _alive(DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, **IMAGES)))


def swin(seed: int = 0) -> SwinForImageClassification:
    torch.manual_seed(seed)
    config = SwinConfig(**IMAGES, embed_dim=12, depths=[2], num_heads=[3], window_size=2)
    return _alive(SwinForImageClassification(config))


def _alive(model: Any) -> Any:
    """Biases and tables that begin at 0 get values, so that they count."""
    for name, p in model.named_parameters():
        if name.endswith("bias") or "table" in name:
            nn.init.normal_(p, std=0.3)
        elif p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model.eval()


MODELS: dict[str, Callable[..., Any]] = {"vit": vit, "deit": deit, "swin": swin}


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def weights(rows: int = 6, fan: int = 1000, seed: int = 0) -> Tensor:
    return torch.randn(rows, fan, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def specimen(seed: int) -> tuple[nn.Module, Callable[[nn.Module], object], tuple[Tensor, ...]]:
    """A convolution and a linear layer rounded by the statistics of their rows."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    def apply(made: nn.Module) -> None:
        for name, bits in (("0", 3), ("2", 2)):
            layer = made.get_submodule(name)
            parametrize.register_parametrization(layer, "weight", StatsQuantizer(bits).for_layer(layer))

    return model, apply, (torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(7)),)


# --------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_levels_are_half_integers_of_the_row(bits: int) -> None:
    w, n = weights(), 2 ** (bits - 1)
    w[0, 0] = -50.0  # far outside: one bit must not round it to a third level
    s = 2 * w.abs().mean(1, keepdim=True)
    levels = (StatsQuantizer(bits)(w) / s * n - 0.5).round(decimals=9)
    assert sorted(levels.unique().tolist()) == list(range(-n, n))
    inside = w.abs() <= s
    assert ((StatsQuantizer(bits)(w) - w).abs() <= s / (2 * n) * (1 + 1e-9))[inside].all()
    nearest = ((torch.arange(-n, n) + 0.5) / n)[None, None]
    assert torch.equal((w / s).unsqueeze(-1).sub(nearest).abs().argmin(-1) - n, StatsQuantizer(bits).codes(w).long())


def test_two_bits_are_a_half_and_one_and_a_half_of_the_mean() -> None:
    w = torch.tensor([[1.0, -2.0, 4.0, -0.2]])
    torch.testing.assert_close(StatsQuantizer(2)(w), torch.tensor([[0.9, -2.7, 2.7, -0.9]]))


def test_it_is_equivariant_and_odd() -> None:
    q, w = StatsQuantizer(3), weights()
    torch.testing.assert_close(q(7.3 * w), 7.3 * q(w), rtol=1e-6, atol=0)
    assert torch.equal(q(-w), -q(w))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_on_normal_rows(bits: int) -> None:
    """By integration over the normal density: clipping at 1.6 deviations keeps it from going to 0."""
    n, scale = 2 ** (bits - 1), 2 * math.sqrt(2 / math.pi)

    def squared(x: float) -> float:
        k = min(max(math.floor(x / scale * n), -n), n - 1)
        return (x - scale * (k + 0.5) / n) ** 2 * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    edges = [scale * k / n for k in range(-n, n + 1)]
    wanted = sum(integrate.quad(squared, a, b)[0] for a, b in itertools.pairwise([-9.0, *edges, 9.0]))
    w = weights(400, 1000)
    assert float((StatsQuantizer(bits)(w) - w).square().mean()) == pytest.approx(wanted, rel=0.02)
    assert wanted > 0.045


def test_the_gradient_is_straight_through_even_where_weights_are_clipped() -> None:
    w, g = weights().requires_grad_(), weights(seed=1)
    (StatsQuantizer(2)(w) * g).sum().backward()
    assert torch.equal(w.grad, g)
    assert (w.detach().abs() > 2 * w.detach().abs().mean(1, keepdim=True)).any()


def test_rows_of_zeros_stay() -> None:
    w = weights(3, 8)
    w[1] = 0
    q = StatsQuantizer(2)
    assert torch.equal(q(w)[1], torch.zeros(8, dtype=w.dtype))
    assert torch.equal(q.pack(w).dense(), q(w))


# ----------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("signed", [True, False])
def test_the_step_of_activations_learns_as_lsq(signed: bool) -> None:
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = LsqActivation(3, signed, features=6, tokens=7).double()
    low, high = (-4, 3) if signed else (0, 7)
    x.requires_grad_()
    out = q(x)
    start = (2 if signed else 4) * x.detach().abs().mean((0, 2)) / high**0.5
    torch.testing.assert_close(q.scale.detach()[:, 0], start)
    (out * g).sum().backward()
    s = q.scale.detach()
    v = x.detach() / s
    torch.testing.assert_close(out.detach(), v.clamp(low, high).round() * s)
    each = torch.where(v <= low, float(low), torch.where(v >= high, float(high), v.round() - v))
    torch.testing.assert_close(q.scale.grad[:, 0], (each * g).sum((0, 2)) / (high * 4 * 6) ** 0.5)
    inside = (v > low) & (v < high)
    torch.testing.assert_close(x.grad, g * inside)
    torch.testing.assert_close(q.before.grad, (g * inside).sum((0, 1)))
    torch.testing.assert_close(q.after.grad, g.sum((0, 1)))


def test_shapes_of_steps() -> None:
    x = torch.randn(2, 3, 5, 5)
    for options, shape in (({"tokens": 5}, (5, 1)), ({"channels": 5}, (5,)), ({}, (1,))):
        q = LsqActivation(2, **options)
        assert q(x).shape == x.shape
        assert q.scale.shape == shape
    with pytest.raises(QuantizationError, match="tokens=0"):
        LsqActivation(2, tokens=5)(torch.randn(2, 6, 5))
    with pytest.raises(QuantizationError, match="give one"):
        LsqActivation(2, tokens=5, channels=3)
    with pytest.raises(QuantizationError, match="2 bits or more"):
        LsqActivation(1)
    with pytest.raises(QuantizationError, match="NaN"):
        LsqActivation(2)(torch.tensor([math.nan]))


def test_an_optimizer_made_before_the_first_batch_trains_the_steps() -> None:
    q = LsqActivation(2, features=4)
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1)
    q(torch.randn(3, 4)).square().sum().backward()
    before = q.scale.detach().clone()
    optimizer.step()
    assert not torch.equal(q.scale.detach(), before)


# -------------------------------------------------------------------------------------------- query and key


def test_the_product_is_attention() -> None:
    """Invariant 6, and 7: biases are folded, not dropped."""
    torch.manual_seed(0)
    for bias in (False, True):
        mha = nn.MultiheadAttention(24, 3, bias=bias, batch_first=True).double()
        nn.init.normal_(mha.in_proj_weight)
        if bias:
            nn.init.normal_(mha.in_proj_bias)
        x = torch.randn(2, 5, 24, dtype=torch.float64)
        ours = QKRAttention.of(mha, w_bits=32, a_bits=32)
        shift = 0 if mha.in_proj_bias is None else mha.in_proj_bias
        q, k, _ = ((x @ mha.in_proj_weight.T) + shift).chunk(3, -1)
        q, k = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k))
        wanted = q @ k.mT / 8**0.5
        found = ours.logits(x)
        if bias:  # up to what is the same for all keys
            found, wanted = found - found.mean(-1, keepdim=True), wanted - wanted.mean(-1, keepdim=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        out, shares = mha(x, x, x)
        mine, my_shares = ours(x, x, x)
        torch.testing.assert_close(mine, out, rtol=0, atol=1e-10)
        torch.testing.assert_close(my_shares, shares, rtol=0, atol=1e-10)
        out.square().sum().backward()
        mine.square().sum().backward()
        pair = ours.query_key
        assert isinstance(pair, QueryKey)
        wanted_q, wanted_k, wanted_v = mha.in_proj_weight.grad.chunk(3)
        torch.testing.assert_close(ours.value.weight.grad, wanted_v)
        if not bias:
            torch.testing.assert_close(pair.query.grad, wanted_q)
            torch.testing.assert_close(pair.key.grad, wanted_k)


@pytest.mark.parametrize("name", MODELS)
def test_models_without_rounding_are_as_they_were(name: str) -> None:
    model, x = MODELS[name](), images()
    changes = ofq_quantize(model, 32, 32, end_bits=32)
    assert sum(isinstance(m, QKRAttention) for m in changes.model.modules()) == 2
    torch.testing.assert_close(changes.model(x).logits, model(x).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_torch_masks(first: bool) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(12, 2, batch_first=first).double().eval()
    ours = QKRAttention.of(mha, 32, 32)
    x = torch.randn(5, 5, 12, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(5, 5, dtype=torch.bool)
    padding[1, 3:] = True
    each = torch.randn(10, 5, 5, dtype=torch.float64)
    for options in ({"attn_mask": causal}, {"key_padding_mask": padding}, {"attn_mask": each}):
        for mine, wanted in zip(ours(x, x, x, **options), mha(x, x, x, **options), strict=True):
            torch.testing.assert_close(mine, wanted)
    one = x[0]
    torch.testing.assert_close(ours(one, one, one)[0], mha(one, one, one)[0])
    assert ours(x, x, x, need_weights=False)[1] is None
    with pytest.raises(QuantizationError, match="self-attention"):
        ours(x, x + 1, x)


class Attention(nn.Module):
    """The names and the computation of timm's."""

    def __init__(self, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm, self.attn_drop = norm(), norm(), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_attention_that_is_known_and_that_is_not() -> None:
    torch.manual_seed(0)
    timm, x = Attention(), torch.randn(2, 6, 8)
    torch.testing.assert_close(QKRAttention.of(timm, 32, 32)(x), timm(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(QuantizationError, match="q_norm"):
        QKRAttention.of(Attention(nn.Tanh))
    with pytest.raises(QuantizationError, match="is no attention"):
        QKRAttention.of(nn.Linear(3, 3))
    odd = Attention()
    odd.num_heads = 3
    with pytest.raises(QuantizationError, match="heads divide"):
        QKRAttention.of(odd)
    with pytest.raises(QuantizationError, match="other sizes"):
        QKRAttention.of(nn.MultiheadAttention(8, 2, kdim=4))
    rotary = llama()
    changes = ofq_quantize(rotary, 2, 8, ends=["last"])
    assert "one by one" in changes.left["model.layers.0.self_attn"]
    assert "by token" in changes.left["model.embed_tokens"]
    assert "model.layers.0.self_attn.q_proj" in changes.changed
    assert torch.isfinite(changes.model(torch.randint(200, (2, 9))).logits).all()


# ------------------------------------------------------------------------------------------------ whole models


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2])
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(images()).logits, y).backward()
        optimizer.step()
    return model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [False, True])
def test_train_bake_save_and_load(name: str, tokens: bool, tmp_path: Path) -> None:
    count = {"vit": 17, "deit": 18, "swin": 0}[name] if tokens else 0
    model = MODELS[name]()
    changes = ofq_quantize(model, 2, 3, tokens=count)
    known = set(changes.changed) | set(changes.left)
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)} <= known
    made = changes.model.train()
    train(made, adam(made))
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad and p.dim() == 2)
    made.eval()
    out = made(images()).logits
    baked = ofq_bake(made)
    assert torch.equal(baked.model(images()).logits, out)
    levels = {n: p.constants["levels"] for n, _, p in packed_modules(baked.model)}
    assert set(levels.values()) == {4, 256}
    assert {n for n, c in levels.items() if c == 256} == {
        n for n in levels if n.endswith("projection") or "classifier" in n
    }
    assert sum(n.endswith("query_key") for n in levels) == 2
    folder = save_packed(baked.model, tmp_path / "small")
    again = load_packed(folder, into=merge_query_keys(ofq_quantize(MODELS[name](1), 2, 3, tokens=count).model))
    assert torch.equal(again(images()).logits, out)


def test_what_a_packed_product_takes() -> None:
    baked = ofq_bake(ofq_quantize(vit(), 2, 2, calibration=[images()]).model).model
    sizes = {n.rpartition(".")[2]: nbytes(p) for n, _, p in packed_modules(baked)}
    assert sizes["query_key"] == 3 * 24 * 24 // 4 + 4 * 3 * 24 + 4  # heads x C x C codes, a scale each row, one zero
    assert sizes["value"] == 24 * 24 // 4 + 4 * 24 + 4


def test_any_number_of_tokens_and_images() -> None:
    made = ofq_quantize(vit(), 2, 2, calibration=[images()]).model.eval()
    a = made(images(6)).logits
    torch.testing.assert_close(made(images(6)[:1]).logits, a[:1])
    wide = torch.randn(2, 1, 12, 12)
    assert made(wide, interpolate_pos_encoding=True).logits.shape == (2, 5)


def test_other_weights_without_qkr() -> None:
    changes = ofq_quantize(vit(), 3, 3, weights=LSQ(3, granularity="channel"))
    assert not any(isinstance(m, QKRAttention) for m in changes.model.modules())
    assert sum(isinstance(q, LSQ) and q.bits == 3 for _, q, _ in latents(changes.model)) == 12
    plain = ofq_quantize(vit(), 3, 3, qkr=False, skip=["*fc1"])
    assert plain.left["vit.layers.0.mlp.fc1"] == "skipped as asked"


def test_torch_encoders() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu").eval()
    model = nn.Sequential(nn.Linear(4, 16), layer, nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 4)
    plain = ofq_quantize(model, 32, 32, end_bits=32).model.eval()
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    made = ofq_quantize(model, 4, 8).model.eval()
    assert torch.equal(ofq_bake(made).model(x), made(x))
    inputs = made[1].linear2.input_quantizer
    assert not inputs.signed


def test_a_state_dict_holds_all() -> None:
    made = ofq_quantize(swin(), 2, 2).model
    train(made, adam(made))
    other = ofq_quantize(swin(1), 2, 2).model
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(images()).logits, made.eval()(images()).logits)


def test_the_distillation_loss() -> None:
    torch.manual_seed(0)
    logits, teacher, token = torch.randn(3, 4, 5).double()
    labels = torch.tensor([0, 1, 2, 3])
    hard = functional.cross_entropy(logits, labels, label_smoothing=0.1)
    soft = functional.kl_div(token.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(distillation_loss(logits, labels, teacher, token), hard + soft + entropy)
    own = distillation_loss(logits, labels, teacher, label_smoothing=0.0)
    assert own < distillation_loss(logits, labels, -teacher, label_smoothing=0.0) or own > 0


# --------------------------------------------------------------------------------------------------- annealing


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_confident_weights_do_not_move_at_all(kind: str) -> None:
    made = ofq_quantize(vit(), 2, 4).model
    optimizer = (
        adam(made) if kind == "adamw" else torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    )
    train(made, optimizer)  # momentum is there
    found = [(q, w) for _, q, w in latents(made) if isinstance(q, StatsQuantizer) and isinstance(w, nn.Parameter)]
    assert len(found) == 2 * 4
    with CGA(made, optimizer, boundary=0.05) as annealing:
        for _ in range(3):
            near = [q.near(w, 0.05) for q, w in found]
            before = [w.detach().clone() for _, w in found]
            assert annealing.frozen() == pytest.approx(
                1 - sum(int(m.sum()) for m in near) / sum(m.numel() for m in near)
            )
            train(made, optimizer, 1)
            for (_, w), mask, old in zip(found, near, before, strict=True):
                assert torch.equal(w[~mask], old[~mask])
                assert bool((w[mask] != old[mask]).any())
    assert all(q.boundary is None for q, _ in found)
    before = [w.detach().clone() for _, w in found]
    train(made, optimizer, 1)
    assert all((w != old).float().mean() > 0.9 for (_, w), old in zip(found, before, strict=True))


def test_the_boundary() -> None:
    q, w = StatsQuantizer(2), weights()
    assert q.near(w, 1.0).all()
    assert not q.near(w, -1e-9).any()
    at = w / w.abs().mean(1, keepdim=True)  # thresholds at -1, 0, 1, steps of 1
    wanted = torch.stack([(at - t).abs() for t in (-1, 0, 1)]).amin(0)
    assert torch.equal(q.near(w, 0.1), wanted <= 0.1)
    clipped = at.abs() > 2
    assert clipped.any()
    assert not q.near(w, 0.999)[clipped].any()
    assert (wanted <= 0.1).float().mean() == pytest.approx(0.156, abs=0.02)  # of normal weights


def test_the_gradient_of_products_is_masked() -> None:
    torch.manual_seed(0)
    pair = QueryKey(torch.randn(8, 8), torch.randn(8, 8), 2, StatsQuantizer(2))
    g = torch.randn(16, 8)
    pair.quantizer.boundary = 0.1
    product = pair.product()
    (wanted,) = torch.autograd.grad((product * (g * pair.quantizer.near(product, 0.1))).sum(), pair.query)
    (found,) = torch.autograd.grad((pair.quantizer(pair.product()) * g).sum(), pair.query)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(QuantizationError, match="StatsQuantizer"):
        CGA(nn.Linear(2, 2), torch.optim.SGD(pair.parameters(), lr=0.1))


# ------------------------------------------------------------------------------------------------ oscillations


def sequence(values: list[float], bits: int = 3) -> OscillationTracker:
    """A weight goes through codes; two others hold the scale at 1 step a unit."""
    layer = nn.Linear(4, 1, bias=False)
    layer = qat_prepare(layer, LSQ(bits)).model
    layer.weight  # noqa: B018 - the first use sets the step
    with torch.no_grad():
        layer.parametrizations.weight[0].scale.fill_(1.0)
    tracker = OscillationTracker(layer, momentum=0.5)
    for value in values:
        layer.parametrizations.weight.original.data.copy_(torch.tensor([[value, 1.0, 2.0, 0.0]]))
        tracker.step()
    return tracker


@pytest.mark.parametrize(
    ("values", "count"), [([0, 1, 0, 1, 0], 3), ([0, 1, 2, 3], 0), ([1, 1, 1, 1], 0), ([0, 1, 1, 0, 0, -1], 1)]
)
def test_the_counter(values: list[float], count: int) -> None:
    (found,) = sequence([float(v) for v in values]).report().values()
    assert found.oscillations == count
    assert found.changes == sum(a != b for a, b in itertools.pairwise(values))
    assert found.weights == 4


def test_the_frequency_is_an_exponential_mean() -> None:
    tracker = sequence([0.0, 1.0, 0.0, 1.0])
    (state,) = tracker.state_dict().values()
    assert state["frequency"][0].tolist() == [0.75, 0.0, 0.0, 0.0]  # 0, then 1/2, then 1/2 + 1/4
    assert tracker.share(0.7) == 0.25
    other = sequence([0.0])
    other.load_state_dict(tracker.state_dict())
    assert other.report() == tracker.report()
    with pytest.raises(QuantizationError, match="here not"):
        other.load_state_dict({"x": state})
    with pytest.raises(QuantizationError, match="momentum"):
        OscillationTracker(nn.Linear(2, 2), 0.0)
    with pytest.raises(QuantizationError, match="prepare it"):
        OscillationTracker(nn.Linear(2, 2))


def test_products_are_tracked() -> None:
    made = ofq_quantize(vit(), 2, 4).model
    tracker = OscillationTracker(made)
    optimizer = adam(made)
    for _ in range(4):
        train(made, optimizer, 1)
        tracker.step()
    report = tracker.report()
    assert sum("query_key" in name for name in report) == 2
    assert sum(o.changes for o in report.values()) > 0


@pytest.mark.parametrize("quantizer", [LSQ(2, granularity="channel"), StatsQuantizer(2)])
def test_freezing_holds_what_oscillates(quantizer: Any) -> None:
    layer = qat_prepare(nn.Sequential(nn.Linear(4, 1, bias=False)), quantizer).model
    latent = layer[0].parametrizations.weight.original
    with torch.no_grad():
        latent.copy_(torch.tensor([[0.1, 1.0, -1.0, 1.0]]))
    layer(torch.ones(1, 4))
    freezing = IterativeFreezing(OscillationTracker(layer, momentum=0.3), threshold=0.4)
    for step in range(8):
        with torch.no_grad():
            latent[0, 0] = 0.6 if step % 2 else -0.6
        freezing.step()
    assert freezing.frozen() == 0.25
    held = layer[0].weight[0, 0].item()
    with torch.no_grad():
        latent[0, 0] = 5.0
    freezing.step()
    assert layer[0].weight[0, 0].item() == pytest.approx(held, rel=0.2)
    assert latent[0, 0] != 5


def test_dampening_draws_weights_to_their_levels() -> None:
    torch.manual_seed(0)
    layer = qat_prepare(nn.Linear(30, 4), StatsQuantizer(2)).model
    latent = layer.parametrizations.weight.original
    size = latent.detach().abs().mean(1, keepdim=True)
    wanted = (layer.weight - latent.clamp(-1.5 * size, 1.5 * size)).square().sum()
    loss = dampening(layer)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    inside = latent.detach().abs() < 1.5 * size
    torch.testing.assert_close(latent.grad, -2 * (layer.weight - latent).detach() * inside)


# ----------------------------------------------------------------------------------------------------- errors


def test_bad_input() -> None:
    for bits in (0, 17, -2):
        with pytest.raises(QuantizationError, match="bits="):
            StatsQuantizer(bits)
        with pytest.raises(QuantizationError, match="bits="):
            LsqActivation(bits)
    model = vit()
    with pytest.raises(QuantizationError, match="calibration is empty"):
        ofq_quantize(model, calibration=[])
    for qkr in (True, False):
        with pytest.raises(QuantizationError, match="compressed already"):
            ofq_quantize(quantize_model(model).model, qkr=qkr)
    with torch.no_grad():
        model.vit.layers[0].attention.q_proj.weight[0, 0] = math.nan
    with pytest.raises(QuantizationError, match=r"q_proj.weight holds NaN"):
        ofq_quantize(model)
    with pytest.raises(QuantizationError, match="nothing to pack"):
        StatsQuantizer(32).pack(torch.ones(2, 2))
