"""The quantization toolbox as a whole: its contract, the invariants of the sheet, models with awkward parts."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

from neuropil.compress.quantize import (
    LSQ,
    RECIPES,
    QuantizationError,
    Quantizer,
    bake,
    calibrate,
    layer_losses,
    qat_prepare,
    quantize_model,
    to_tiles,
)
from neuropil.models.packed_files import load_packed, save_packed
from neuropil.packed import is_packed, nbytes


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(100, 16), nn.Linear(16, 5)
    )


def images() -> Tensor:
    return torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(7))


def specimen(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], None], tuple[Tensor, ...]]:
    """A small convolutional network, four-bit quantizers on all of its weights."""

    def apply(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                quantizer = Quantizer(4, "affine", "channel", observer="mse")
                parametrize.register_parametrization(module, "weight", quantizer)

    return net(seed), apply, (images(),)


SCHEMES = ("affine", "offset", "symmetric", "restricted", "unsigned", "midrise")
tensors = st.integers(0, 2**31).map(lambda seed: torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)))


@given(tensors, st.sampled_from(SCHEMES), st.integers(2, 9), st.sampled_from(["tensor", "channel", ("group", 8)]))
@settings(max_examples=60, deadline=None)
def test_a_round_trip_is_within_half_a_step_and_is_done_once(w: Tensor, scheme: str, bits: int, granularity) -> None:
    """Invariant 1: the error inside the range, Q(Q(r)) = Q(r), 0 stays 0, order is kept."""
    w = w.abs() if scheme == "unsigned" else w
    q = Quantizer(bits, scheme, granularity)
    rounded = q(w)
    grid, tiles = q.grid, q.tiles(w)
    error = (to_tiles(rounded, tiles) - to_tiles(w, tiles)).abs()
    inside = grid.inside(to_tiles(w, tiles))
    assert bool((error <= grid.scale[..., None] / 2 * (1 + 1e-4))[inside].all())
    torch.testing.assert_close(q(rounded), rounded, rtol=0, atol=0)
    if scheme not in ("midrise", "offset"):
        assert not q(torch.zeros_like(w)).any()
    one = Quantizer(bits, scheme)
    line = torch.linspace(0 if scheme == "unsigned" else -2, 3, 500)
    assert bool((one(line).diff() >= 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", ("group", 10), ("channels", 4)])
def test_what_is_packed_is_what_was_simulated(bits: int, granularity) -> None:
    w = torch.randn(8, 20)
    for scheme in (*SCHEMES, "binary", "ternary"):
        q = Quantizer(bits, scheme, granularity)
        assert torch.equal(q.pack(w).dense(), q(w)), scheme


def test_a_real_zero_point_gives_back_what_was_rounded_so_before() -> None:
    """GGUF's Q4_1: 16 levels from the least to the largest of 32 numbers, as its files hold them."""
    gen = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randperm(32, generator=gen) % 16 for _ in range(24)])
    step, least = torch.rand(24, 1, generator=gen) + 0.1, -torch.rand(24, 1, generator=gen)
    w = least + step * codes
    real, whole = (Quantizer(4, scheme, ("group", 32)) for scheme in ("offset", "affine"))
    torch.testing.assert_close(real(w), w, rtol=1e-5, atol=1e-5)
    assert (whole(w) - w).abs().max() > 0.02
    flat = torch.full((2, 32), 3.0)
    assert torch.equal(Quantizer(4, "offset", ("group", 32))(flat), flat)
    half = Quantizer(4, "offset", ("group", 32), scale_dtype="float16")
    assert half.pack(w).bits == 4 + 2 * 16 / 32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["affine", "offset", "symmetric", "codebook", "apot", "ternary", "binary-code"])
def test_scales_in_half_precision(dtype: str, scheme: str) -> None:
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    w[3], w[4] = 0, w[4] * 1e-9
    full, half = (Quantizer(4, scheme, ("group", 32), scale_dtype=d) for d in ("float32", dtype))
    packing = half.pack(w)
    assert torch.equal(packing.dense().float(), half(w))
    assert packing.bits < full.pack(w).bits
    assert (half(w) - w).square().mean() < 1.1 * (full(w) - w).square().mean()
    assert torch.isfinite(half(w)).all()
    with pytest.raises(QuantizationError, match="8 at most"):
        Quantizer(9, scale_dtype=dtype)


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_is_packed_saved_and_loaded(recipe: str, tied: bool, tmp_path: Path) -> None:
    model = llama(tied=tied)
    tokens = torch.arange(12)[None]
    skip = ["model.layers.0.self_attn.*"]
    with torch.no_grad():
        plain = model(tokens).logits
        changes = quantize_model(model, {"*down_proj": "int8", "*": recipe}, skip=skip)  # 32 does not divide its 48
        out = changes.model(tokens).logits
    assert "lm_head" in changes.changed
    assert set(changes.left) == {f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"}
    assert torch.equal(model(tokens).logits, plain)
    save_packed(changes.model, tmp_path / "small")
    again = load_packed(tmp_path / "small", into=llama(seed=1, tied=tied))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, out)
    assert nbytes(changes.model) < nbytes(model) * (0.6 if recipe == "codebook4" else 0.5)
    if recipe in ("int8", "int4", "int4-group"):
        assert torch.nn.functional.cosine_similarity(out.flatten(), plain.flatten(), dim=0) > 0.95


@pytest.mark.parametrize("per_channel", [False, True])
def test_restricted_codes_are_those_of_torch(per_channel: bool) -> None:
    """Invariant 2."""
    w = torch.randn(16, 64)
    q = Quantizer(8, "restricted", "channel" if per_channel else "tensor")
    codes, scale = q.codes(w), q.grid.scale.flatten()
    if per_channel:
        peer = torch.quantize_per_channel(w, scale, torch.zeros(16, dtype=torch.int64), 0, torch.qint8)
    else:
        peer = torch.quantize_per_tensor(w, float(scale), 0, torch.qint8)
    at = w / (scale[:, None] if per_channel else scale)
    off_ties = ((at - at.floor()) - 0.5).abs() > 1e-4
    assert torch.equal(codes[off_ties], peer.int_repr().int()[off_ties])
    assert torch.equal(codes.abs().amax(), torch.tensor(127, dtype=torch.int32))


def test_affine_codes_are_those_of_torch() -> None:
    w = torch.randn(1000) + 0.7
    q = Quantizer(8, "affine")
    codes = q.codes(w)
    peer = torch.quantize_per_tensor(w, float(q.grid.scale), int(q.grid.zero), torch.quint8)
    assert (codes - peer.int_repr().int()).abs().max() <= 1
    assert (codes != peer.int_repr().int()).float().mean() < 1e-2


@given(st.integers(0, 2**31), st.sampled_from([2, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_finer_tiles_have_finer_steps(seed: int, bits: int) -> None:
    """Invariant 3."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(12, 64, generator=gen) * torch.rand(12, 1, generator=gen).exp()
    steps, errors = {}, {}
    for granularity in ("tensor", ("channels", 3), "channel", ("group", 16)):
        q = Quantizer(bits, "symmetric", granularity)
        errors[granularity] = float((q(w) - w).square().mean())
        steps[granularity] = q.grid.scale
    assert bool((steps[("channels", 3)] <= steps["tensor"]).all())
    assert bool((steps["channel"].reshape(4, 3) <= steps[("channels", 3)]).all())
    assert bool((steps[("group", 16)] <= steps["channel"]).all())


def test_finer_tiles_lose_less_on_average() -> None:
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(400, 128, generator=gen) * torch.randn(400, 1, generator=gen).exp()
    loss = [
        float((Quantizer(4, "symmetric", g)(w) - w).square().mean())
        for g in ("tensor", ("channels", 8), "channel", ("group", 32))
    ]
    assert loss == sorted(loss, reverse=True)


@pytest.mark.parametrize("kind", ["MultiheadAttention", "tied", "Conv1D", "Embedding", "Conv3d", "half"])
def test_awkward_models(kind: str) -> None:
    torch.manual_seed(0)
    inputs: tuple[Tensor, ...] = (torch.randn(2, 4, 8),)
    if kind == "MultiheadAttention":
        model: nn.Module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    elif kind == "tied":
        model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
        model[1].weight = model[0].weight
        inputs = (torch.arange(5),)
    elif kind == "Conv1D":
        model = nn.Sequential(Conv1D(12, 8))
    elif kind == "Embedding":
        model, inputs = nn.Sequential(nn.Embedding(10, 8)), (torch.arange(5),)
    elif kind == "Conv3d":
        model, inputs = nn.Sequential(nn.Conv3d(2, 4, 2)), (torch.randn(1, 2, 3, 3, 3),)
    else:
        model, inputs = nn.Sequential(nn.Linear(32, 8)).to(torch.bfloat16), (torch.randn(3, 32).bfloat16(),)
    before = copy.deepcopy(model.state_dict())
    changes = quantize_model(model, Quantizer(8, granularity="channel"))
    told = {*changes.changed, *changes.left}
    wanted = {n for n, m in model.named_modules() if any(p.ndim > 1 for p in m._parameters.values() if p is not None)}
    assert told == wanted
    assert changes.changed
    out, plain = changes.model(*inputs), model(*inputs)
    assert out.dtype == plain.dtype
    torch.testing.assert_close(out, plain, rtol=0.05, atol=0.05)
    assert not torch.equal(out, plain)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    if kind == "tied":
        assert changes.model[0].packing is changes.model[1].packing
        assert not quantize_model(model, skip=["1"]).changed
    if kind == "Conv1D":
        w = model[0].weight
        assert changes.model[0].packing.scale.shape == (1, 12)
        torch.testing.assert_close(changes.model[0].packing.scale[0], 2 * w.abs().amax(0) / 255)


def test_transposed_convolutions_have_their_own_channels() -> None:
    layer = nn.ConvTranspose2d(8, 6, 3, groups=2)
    q = Quantizer(8, "symmetric", "channel").for_layer(layer)
    q(layer.weight)
    size = layer.weight.detach().reshape(2, 4, 3, 9).abs().amax((1, 3))
    torch.testing.assert_close(q.grid.scale, 2 * size / 255)
    grouped = Quantizer(8, "symmetric", ("group", 18)).for_layer(layer)
    assert torch.equal(grouped.pack(layer.weight.detach()).dense(), grouped(layer.weight))
    assert grouped.grid.scale.shape == (4, 3)


def test_activations_are_rounded_and_calibrated() -> None:
    model, x = net(), images()
    settings = {"bits": 8, "scheme": "affine"}
    changes = quantize_model(model, "int8", activations=settings, calibration=[x, (x,)])
    torch.testing.assert_close(changes.model(x), model(x), rtol=0.1, atol=0.05)
    q = changes.model[4].input_quantizer
    read = changes.model[:4](x)
    assert q(read).unique().numel() <= 256
    dynamic = quantize_model(
        model, "int8", activations={"bits": 8, "dynamic": True, "granularity": "token"}, skip=["0", "2"]
    )
    torch.testing.assert_close(dynamic.model(x), model(x), rtol=0.1, atol=0.05)
    with pytest.raises(QuantizationError, match="empty"):
        quantize_model(model, "int8", activations=settings)
    with pytest.raises(QuantizationError, match="empty"):
        calibrate(changes.model, [])


def test_activations_by_channel_and_by_name() -> None:
    x = torch.randn(16, 3, 5, 5) * torch.tensor([0.01, 1.0, 100.0])[:, None, None]
    q = Quantizer(8, "affine", "channel", axis=1)
    q(x)
    assert q.grid.scale.shape == (1, 3)
    error = (q(x[:2]) - x[:2]).abs().amax((0, 2, 3))
    assert bool((error <= q.grid.scale[0] / 2 * 1.001).all())
    torch.testing.assert_close(q.grid.scale[0], (x.amax((0, 2, 3)) - x.amin((0, 2, 3))) / 255)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    made = quantize_model(Named(), "int8", activations={"bits": 2}, calibration=[torch.randn(9, 2, 8)]).model
    assert made(torch.randn(4, 2, 8)).shape == (4, 3, 7)
    assert made.conv.input_quantizer.grid.scale.numel() == 1
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(QuantizationError, match=r"never reached self_attn\.out_proj"):
        quantize_model(attention, "int8", activations={"bits": 8}, calibration=[torch.randn(2, 3, 8)])


def test_losses_of_layers() -> None:
    model = net()
    made = [quantize_model(model, {"bits": bits, "granularity": "channel"}).model for bits in (3, 4, 8)]
    losses = [layer_losses(model, each) for each in made]
    for name in ("0", "2", "4", "5"):
        relative = [loss[name].relative for loss in losses]
        assert relative == sorted(relative, reverse=True)
        weight = model.get_submodule(name).weight.detach()
        rounded = made[0].get_submodule(name).weight
        wanted = float((rounded - weight).square().sum() / weight.square().sum())
        assert relative[0] == pytest.approx(wanted, rel=1e-4)
        assert losses[2][name].decibels - losses[1][name].decibels == pytest.approx(24, abs=4)
    with pytest.raises(QuantizationError, match="no layer"):
        layer_losses(nn.Sequential(nn.ReLU()), quantize_model(model).model)


def test_training_and_baking() -> None:
    model, x = net(), images()
    changes = qat_prepare(model, {"bits": 3, "granularity": "channel", "dynamic": True}, skip=["5"])
    assert set(changes.left) == {"5"}
    optimizer = torch.optim.SGD(changes.model.parameters(), lr=0.03)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (changes.model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    out = changes.model(x)
    baked = bake(changes.model)
    assert baked.changed == changes.changed
    assert torch.equal(baked.model(x), out)
    assert torch.equal(changes.model(x), out), "baking has touched the model it was given"
    assert type(baked.model[0]).__name__ == "PackedConv2d"
    assert all(is_packed(baked.model.get_submodule(n)) for n in baked.changed)
    assert nbytes(baked.model) < nbytes(model) / 4


def test_thirty_two_bits_are_a_bypass() -> None:
    """Invariant 17."""
    w = torch.randn(3, 4)
    assert Quantizer(32)(w) is w
    changes = quantize_model(net(), Quantizer(32))
    assert not changes.changed
    assert set(changes.left.values()) == {"32 bits: left as it is"}
    one = Quantizer(1, "symmetric", "channel")
    torch.testing.assert_close(one(w), w.sign() * w.abs().mean(1, keepdim=True))
    torch.testing.assert_close(one(torch.zeros(3, 4)), w.abs().mean(1, keepdim=True).expand(3, 4))


def test_zero_channels_stay_zero() -> None:
    w = torch.randn(4, 8)
    w[1] = 0
    for scheme in ("affine", "symmetric", "restricted"):
        rounded = Quantizer(4, scheme, "channel", observer="mse")(w)
        assert torch.isfinite(rounded).all()
        assert not rounded[1].any()


def test_mixed_precision_by_name() -> None:
    changes = quantize_model(net(), {"5": {"bits": 8}, "[04]": Quantizer(3, "affine", "channel")})
    assert changes.changed == ("0", "4", "5")
    assert "no pattern" in changes.left["2"]
    assert changes.model[5].packing.constants["levels"] == 256
    assert changes.model[0].packing.constants["levels"] == 8


def test_what_cannot_be_quantized_is_refused() -> None:
    model = net()
    with pytest.raises(QuantizationError, match="1 to 16"):
        Quantizer(17)
    with pytest.raises(QuantizationError, match="1 to 16"):
        Quantizer(0)
    with pytest.raises(QuantizationError, match="larger"):
        quantize_model(model, Quantizer(4, "affine", ("group", 128)))
    with pytest.raises(QuantizationError, match=r"^0.*divisor"):
        quantize_model(model, Quantizer(4, "affine", ("group", 7)))
    with pytest.raises(QuantizationError, match="compressed already"):
        quantize_model(quantize_model(model).model)
    with pytest.raises(QuantizationError, match="recipe"):
        quantize_model(model, "int5")
    for bad in ({"scheme": "odd"}, {"observer": "eye"}, {"rounding": "up"}, {"gradient": "no"}, {"granularity": "odd"}):
        with pytest.raises(QuantizationError, match="expected"):
            Quantizer(4, **bad)(torch.randn(3, 3))
    with pytest.raises(QuantizationError, match="dynamic"):
        Quantizer(8, granularity="token")
    with pytest.raises(QuantizationError, match="int64"):
        Quantizer(8)(torch.arange(3))
    q = Quantizer(8, granularity="channel")
    q(torch.randn(3, 3))
    with pytest.raises(QuantizationError, match="tiles"):
        q(torch.randn(4, 3))
    with pytest.raises(QuantizationError, match="meta"):
        quantize_model(nn.Sequential(nn.Linear(4, 4, device="meta")))
    assert "empty" in quantize_model(nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 4))).left["0"]
    assert "no shape" in quantize_model(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))).left["0"]
    pruned = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(QuantizationError, match=r"0\.weight is made by a hook"):
        quantize_model(pruned)
    prune.remove(pruned[0], "weight")
    assert quantize_model(pruned).changed == ("0", "1")
    prepared = qat_prepare(model, LSQ(4)).model
    assert all("parametrized" in why for why in quantize_model(prepared).left.values())
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    with pytest.raises(QuantizationError, match=r"4\.weight"):
        quantize_model(model)
