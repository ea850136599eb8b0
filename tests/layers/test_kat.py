"""KAT: the rational function and its gradient, the layer, the initialisation, the transformer, models of others."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import transformers as hf
from scipy.interpolate import BSpline
from torch import Tensor, nn
from torch.nn import functional as F

from neuropil.layers import _kat_rational
from neuropil.layers._kat_fit import FUNCTIONS, TABLES, as_function, coefficients
from neuropil.layers.bspline_kan import BSplineKAN, bspline_basis
from neuropil.layers.kat import (
    GRKAN,
    KAT,
    GRKANMlp,
    GroupRational,
    KATBlock,
    fit_rational,
    gain,
    kat_base,
    kat_small,
    kat_tiny,
    rational,
    replace,
)
from neuropil.neurons import capture, find_sites

CORE = 1
SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "in_channels": 1, "num_classes": 10, "dim": 32, "heads": 4}


def specimen(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A GR-KAN layer whose groups differ, and a batch of inputs."""
    torch.manual_seed(seed)
    layer = GRKAN(8, 5, groups=4, share="none")
    return shaken(layer), (torch.randn(6, 8),)


def shaken(module: nn.Module, size: float = 0.1) -> nn.Module:
    """The module with every parameter off its initial value, so that no two groups are alike."""
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn_like(p)
    return module


@pytest.fixture
def _unchecked() -> Iterator[None]:
    """The compiler cannot look into jaxtyping's checks of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def written_out(x: Tensor, a: Tensor, b: Tensor, form: str) -> Tensor:
    """The formula as it stands in the paper and in the kernels, for autograd."""
    size = x.shape[-1]
    a, b = (rows.repeat_interleave(size // len(rows), 0) for rows in (a, b))
    top = sum(a[:, i] * x**i for i in range(a.shape[1]))
    if form == "A":
        below: Any = sum(b[:, j].abs() * x.abs() ** (j + 1) for j in range(b.shape[1]))
    else:
        below = sum(b[:, j] * x ** (j + 1) for j in range(b.shape[1])).abs()
    return top / (1 + below)


# --- the function and its gradient ---------------------------------------------------------------


@pytest.mark.parametrize("form", ["A", "B"])
@pytest.mark.parametrize("share", ["numerator", "denominator", "none"])
@pytest.mark.parametrize("order", [(5, 4), (1, 1), (3, 2)])
def test_equals_the_formula_forward_and_backward(form: str, share: str, order: tuple[int, int]) -> None:
    rows = (1 if share == "numerator" else 4, 1 if share == "denominator" else 4)
    a, b = draw(0, rows[0], order[0] + 1).requires_grad_(), draw(1, rows[1], order[1]).requires_grad_()
    x, weigh = draw(2, 3, 5, 8).requires_grad_(), draw(3, 3, 5, 8)
    found, expected = rational(x, a, b, form), written_out(x, a, b, form)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pairs = (torch.autograd.grad((y * weigh).sum(), [x, a, b]) for y in (found, expected))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [0, 1, 7, 8])
def test_blocks_of_rows_add_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, x = draw(0, 1, 6).requires_grad_(), draw(1, 2, 4).requires_grad_(), draw(2, rows, 4).requires_grad_()

    def found() -> list[Tensor]:
        y = rational(x, a, b)
        return [y, *torch.autograd.grad(y.square().sum(), [x, a, b])]

    whole = found()
    for entries in (1, 12):  # less than a row, and three rows
        monkeypatch.setattr(_kat_rational, "BLOCK", entries)
        for mine, expected in zip(found(), whole, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["A", "B"])
def test_gradcheck(form: str) -> None:
    """First and second derivatives, with x and b off 0."""
    a, b = draw(0, 1, 6).requires_grad_(), draw(1, 2, 4).requires_grad_()
    x = draw(2, 7, 4).requires_grad_()
    assert float(x.detach().abs().min()) > 1e-3
    assert torch.autograd.gradcheck(lambda *args: rational(*args, form), (x, a, b), eps=1e-6, atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda *args: rational(*args, form), (x, a, b), eps=1e-6, atol=1e-5)


def test_the_sign_of_zero_is_one() -> None:
    """Where torch.sign would hold b at 0 for ever: dF/db_j = -(P / Q^2) |x|^j at b = 0; dF/dx from the right at 0."""
    act = GroupRational(2, groups=1, init="identity", dtype=torch.float64)
    act(torch.tensor([[2.0, 0.0]], dtype=torch.float64)).sum().backward()
    assert act.weight_denominator.grad is not None
    assert act.weight_denominator.grad.tolist() == [[-4.0, -8.0, -16.0, -32.0]]
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    rational(x, x.new_tensor([[1.0, 3.0]]), x.new_tensor([[0.5]])).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == 3.0 - 0.5  # R / Q - S P / Q^2 with S = |b_1|


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_denominator_is_at_least_one(form: str) -> None:
    x = torch.linspace(-1e3, 1e3, 4001, dtype=torch.float64)[:, None]
    for seed in range(5):
        a, b = draw(seed, 1, 6), draw(seed + 9, 1, 4)
        assert torch.isfinite(rational(x, a, b, form)).all()
        q = 1 / rational(x, torch.tensor([[1.0, 0.0]], dtype=torch.float64), b, form)
        assert float(q.min()) >= 1 - 1e-15
        if form == "A":
            torch.testing.assert_close(q, q.flip(0), rtol=1e-12, atol=0)


def test_the_tail_is_a_line() -> None:
    act = GroupRational(1, groups=1, dtype=torch.float64)
    with torch.no_grad():
        act.weight_denominator[0, 3] = -0.5
        a5 = float(act.weight_numerator[0, 5])
        ends = act(torch.tensor([[1e3], [1e3 + 1]], dtype=torch.float64)).flatten()
    assert float(ends[1] - ends[0]) == pytest.approx(a5 / 0.5, rel=0.01)


def test_keeps_only_its_inputs_for_the_backward_pass() -> None:
    """The plain formula keeps many tensors of the size of x; here x is the only one."""

    def kept(f: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = f()
        assert out.requires_grad
        return sum(sizes.values())

    x, a, b = draw(0, 1000, 8).requires_grad_(), draw(1, 1, 6).requires_grad_(), draw(2, 4, 4).requires_grad_()
    assert kept(lambda: rational(x, a, b)) < 1.1 * x.nbytes
    assert kept(lambda: written_out(x, a, b, "A")) > 8 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    act = GroupRational(8)
    x = draw(0, 50, 8).to(dtype)
    y = act(x)
    assert y.dtype == dtype
    assert torch.equal(y, act(x.float()).to(dtype))
    half = GroupRational(8, init="identity").to(dtype)
    assert torch.equal(half(x), x)


def test_shapes() -> None:
    act = shaken(GroupRational(8, groups=4))
    x = draw(0, 2, 3, 5, 8, dtype=torch.float32)
    maps = shaken(GroupRational(8, groups=4, channel_dim=1))
    maps.load_state_dict(act.state_dict())
    torch.testing.assert_close(maps(x.movedim(-1, 1)), act(x).movedim(-1, 1))
    torch.testing.assert_close(act(x[0, 0, 0]), act(x)[0, 0, 0])
    empty = x[:0].requires_grad_()
    act(empty).sum().backward()
    assert act(empty).shape == empty.shape
    assert all(float(p.grad.abs().sum()) == 0 for p in act.parameters() if p.grad is not None)


def test_channels_of_a_group_may_change_places() -> None:
    act = shaken(GroupRational(6, groups=2))
    x = draw(0, 9, 6, dtype=torch.float32)
    within, across = [2, 0, 1, 4, 5, 3], [3, 4, 5, 0, 1, 2]
    torch.testing.assert_close(act(x)[:, within], act(x[:, within]))
    assert not torch.allclose(act(x)[:, across], act(x[:, across]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 10}, "groups of equal size"),
        ({"init": "swiss"}, "expected one of identity"),
        ({"init": ([0.0, 1.0], [0.0] * 4)}, "needs 6 and 4"),
        ({"init": lambda x: x.sqrt()}, "no finite values"),
        ({"denominator": "C"}, 'expected "A"'),
        ({"share": "all"}, "expected one of numerator"),
        ({"order": (5, 0)}, "at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupRational(**{"num_channels": 16, **options})


def test_bad_input() -> None:
    act = GroupRational(8)
    for x in (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="floating point"):
            act(x)
    with pytest.raises(ValueError, match="expected 8 channels"):
        act(torch.ones(8, 2))


# --- fits and gains ------------------------------------------------------------------------------

GRID = torch.linspace(-3, 3, 2001, dtype=torch.float64)


def test_identity_is_exact() -> None:
    x = torch.linspace(-20, 20, 4001)
    act = GroupRational(1, groups=1, init="identity")
    assert torch.equal(act(x[:, None])[:, 0], x)
    layer, linear = GRKAN(16, 5, init="identity"), nn.Linear(16, 5)
    with torch.no_grad():
        layer.weight.copy_(linear.weight)
        layer.bias.copy_(linear.bias)
    torch.testing.assert_close(layer(x[:, None].expand(-1, 16)), linear(x[:, None].expand(-1, 16)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "worst"), [("swish", 2e-6), ("gelu", 5e-3), ("tanh", 5e-5), ("relu", 0.031), ("swishglu", 5e-4)]
)
def test_named_initial_values(name: str, worst: float) -> None:
    for form in ("A", "B"):
        a, b = coefficients(name, (5, 4), form)
        bar = worst if (name, form) != ("relu", "B") else 0.035
        assert float((as_function(a, b, form)(GRID) - FUNCTIONS[name](GRID)).abs().max()) < bar


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_fitter_is_at_least_as_good_as_the_tables(form: str) -> None:
    x = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    for (name, _), (a, b) in ((key, pair) for key, pair in TABLES.items() if key[1] == form):
        theirs = float((as_function(a, b, form)(x) - FUNCTIONS[name](x)).square().mean().sqrt())
        assert fit_rational(FUNCTIONS[name], denominator=form).rmse <= 1.01 * theirs


@pytest.mark.parametrize("form", ["A", "B"])
def test_the_fitter_finds_a_planted_function(form: str) -> None:
    a, b = (0.3, -1.0, 0.5, 0.2, -0.1, 0.05), (0.4, 0.3, 0.2, 0.1)
    found = fit_rational(as_function(a, b, form), (-2.0, 4.0), denominator=form)
    assert found.worst < 1e-6
    wide = fit_rational(F.gelu, (-8.0, 8.0), denominator=form)
    x = torch.linspace(-8, 8, 999, dtype=torch.float64)
    ours = as_function(wide.numerator, wide.denominator, form)
    assert float((ours(x) - F.gelu(x)).abs().max()) < 0.15  # the fit on [-3, 3] is off by more than 1 there
    with pytest.raises(ValueError, match="low < high"):
        fit_rational(F.gelu, (1.0, -1.0))
    with pytest.raises(ValueError, match="shape"):
        fit_rational(lambda x: x.sum())


def test_gains() -> None:
    assert gain(lambda x: x) == pytest.approx(1, abs=1e-12)
    assert gain(torch.relu) == pytest.approx(2, abs=1e-9)
    for name, form, exact, paper in (("swish", "A", 2.8108, 2.8178), ("gelu", "A", 2.3516, 2.3568)):
        found = GroupRational(8, init=name, denominator=form).gain()
        assert found == pytest.approx(exact, abs=1e-3)
        assert found == pytest.approx(paper, rel=0.01)
    for name, paper in (("geglu", 0.7112), ("swishglu", 0.8434)):
        assert gain(FUNCTIONS[name]) == pytest.approx(paper, rel=0.01)
    with pytest.raises(ValueError, match="no weights keep"):
        gain(torch.zeros_like)


def test_the_initialisation_keeps_the_variance() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 256)
    with torch.no_grad():
        assert 0.93 < float(GRKAN(256, 256)(x).square().mean()) < 1.07
        assert float(GRKAN(256, 256, weight_init="torch")(x).square().mean()) < 0.2
        deep = nn.Sequential(*(GRKAN(256, 256, init="identity") for _ in range(10)))
        assert 0.7 < float(deep(x).var()) < 1.4
        mlp = GRKANMlp(256, 1024, act_init=("gelu", "relu"))
        assert 0.9 < float(mlp(x).square().mean()) < 1.1
        released = GRKANMlp(256, 1024, weight_init="released")
        assert float(released.fc2.weight.std()) == pytest.approx(0.02, rel=0.02)  # cut at 100 deviations
        assert float(released.fc1.bias.abs().max()) == 0


# --- layers --------------------------------------------------------------------------------------


def test_a_layer_is_a_linear_map_of_the_activation() -> None:
    layer = shaken(GRKAN(8, 5, groups=1))
    assert isinstance(layer, GRKAN)
    x = draw(0, 3, 8, dtype=torch.float32)
    torch.testing.assert_close(layer(x), F.linear(layer.act(x), layer.weight, layer.bias))
    layer = GRKAN(24, 7, groups=8)
    assert sum(p.numel() for p in layer.parameters()) == 24 * 7 + 7 + 6 + 4 * 8
    assert GRKAN(24, 7, bias=False).bias is None
    with pytest.raises(ValueError, match="weight_init"):
        GRKAN(8, 5, weight_init="xavier")
    with pytest.raises(ValueError, match="at least one"):
        GRKAN(8, 0)


def test_around_holds_the_parameters_themselves() -> None:
    linear = nn.Linear(16, 5, bias=False).double().eval()
    layer = GRKAN.around(linear)
    assert layer.weight is linear.weight
    assert not layer.training
    x = draw(0, 3, 16)
    assert torch.equal(layer(x), linear(x))


def test_the_mlp_is_two_layers() -> None:
    mlp = GRKANMlp(8, 16, 5, drop=(0.1, 0.2)).eval()
    x = draw(0, 3, 8, dtype=torch.float32)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.silu(mlp.fc1(x))), atol=1e-5, rtol=1e-5)
    layers = nn.Sequential(GRKAN(8, 16, init="identity"), GRKAN(16, 5))
    with torch.no_grad():
        for layer, old in zip(layers, (mlp.fc1, mlp.fc2), strict=True):
            layer.weight.copy_(old.weight)
    torch.testing.assert_close(layers(x), mlp(x))
    maps = GRKANMlp(8, 16, use_conv=True)
    assert maps(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)
    assert GRKANMlp(8, act_layer=nn.Tanh).act2(torch.full((1, 8), 0.5))[0, 0].item() == pytest.approx(
        math.tanh(0.5), abs=1e-5
    )
    with pytest.raises(ValueError, match="norm"):
        GRKANMlp(8, norm_layer=nn.LayerNorm)
    torch.manual_seed(0)
    mlp.train()
    assert not torch.equal(mlp(x), mlp(x))


def test_weights_of_an_mlp_move_over() -> None:
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    new = GRKANMlp(64, 256, act_init=("identity", "gelu"))
    with torch.no_grad():
        for mine, theirs in ((new.fc1, old[0]), (new.fc2, old[2])):
            mine.load_state_dict(theirs.state_dict())
        x = torch.randn(1000, 64)
        assert float((new(x) - old(x)).abs().max()) < 1e-2


# --- the transformer -----------------------------------------------------------------------------


def test_parameters_of_the_papers_models() -> None:
    with torch.device("meta"):
        tiny, small, base = kat_tiny(), kat_small(), kat_base()
    assert sum(p.numel() for p in tiny.parameters()) == 5_718_328
    assert [round(sum(p.numel() for p in m.parameters()) / 1e6, 1) for m in (small, base)] == [22.1, 86.6]
    names = set(tiny.state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.11.attn.qkv.bias", "head.bias"} <= names
    assert tiny.state_dict()["blocks.0.mlp.act1.weight_numerator"].shape == (1, 6)
    assert tiny.state_dict()["blocks.0.mlp.act2.weight_denominator"].shape == (8, 4)
    assert tiny.no_weight_decay() <= names


def test_the_transformer_learns_and_starts_from_a_vit() -> None:
    torch.manual_seed(0)
    model = KAT(depth=2, act_init=("identity", "gelu"), **SMALL)

    def plain(dim: int, hidden: int) -> nn.Module:
        mlp = nn.Sequential()
        mlp.fc1, mlp.act, mlp.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        return mlp

    vit = KAT(depth=2, mlp=plain, **SMALL)
    model.load_vit(vit.state_dict())
    x = torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(model(x), vit(x), atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match=r"missing \['head.bias'\]"):
        model.load_vit({k: v for k, v in vit.state_dict().items() if k != "head.bias"})
    with pytest.raises(ValueError, match="expected 16 x 16"):
        model(torch.randn(5, 1, 20, 20))
    y = torch.arange(5)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    act = model.blocks[0].mlp.act2
    assert act.weight_denominator.std(0).max().item() > 0, "the groups have not come apart"


@pytest.mark.usefixtures("_unchecked")
def test_compiles_whole() -> None:
    model = KAT(depth=1, **SMALL)
    x = torch.randn(3, 1, 16, 16)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_released_initialisation() -> None:
    torch.manual_seed(0)
    attention = KAT(depth=1, weight_init="released", **{**SMALL, "heads": 1}).blocks[0].attn
    q, k, v = attention.qkv.weight.detach().chunk(3)
    eye = torch.eye(32)
    assert float((q.T @ k * eye).sum() / 32) == pytest.approx(0.7, abs=0.1)
    assert float((v @ attention.proj.weight.detach() * eye).sum() / 32) == pytest.approx(-0.4, abs=0.1)


def test_drop_path() -> None:
    torch.manual_seed(0)
    block = KATBlock(16, 2, drop_path=0.5)
    x = torch.randn(400, 3, 16)
    with torch.no_grad():
        untouched = (block(x) == x).flatten(1).all(1).float().mean()
        assert float(untouched) == pytest.approx(0.25, abs=0.08)  # both branches dropped
        torch.testing.assert_close(block.eval()(x), block(x))
    with pytest.raises(ValueError, match="drop_path"):
        KATBlock(16, 2, drop_path=1.0)
    with pytest.raises(ValueError, match="heads"):
        KATBlock(16, 3)
    with pytest.raises(ValueError, match="whole number"):
        KAT(**{**SMALL, "patch_size": 5})


# --- models of others ----------------------------------------------------------------------------


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.ViTConfig(**{**sizes, "image_size": 16, "patch_size": 8, "num_labels": 10, **options})
    return hf.ViTForImageClassification(config).eval()


def test_replace_in_a_vit_of_hugging_face() -> None:
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    changes = replace(model)
    layers = [f"vit.layers.{i}.mlp" for i in range(2)]
    assert set(changes.changed) == {f"{layer}.{part}" for layer in layers for part in ("fc1", "activation_fn")}
    assert not changes.left
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(changes.model(x).logits, model(x).logits, atol=2e-3, rtol=0)
    assert not torch.equal(changes.model(x).logits, model(x).logits)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model given was changed"
    after = changes.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items()), "weights were lost"
    assert len(after) == len(before) + 4 * len(layers)
    changes.model(x).logits.square().sum().backward()
    assert all(
        p.grad is not None and float(p.grad.abs().sum()) > 0
        for n, p in changes.model.named_parameters()
        if "weight_" in n
    )


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("make", [lambda: replace(vit()).model, lambda: BSplineKAN(3, 2)], ids=["replaced", "splines"])
def test_others_compile_whole_too(make: Callable[[], nn.Module]) -> None:
    model = make()
    x = torch.rand(4, 3) if isinstance(model, BSplineKAN) else torch.randn(4, 3, 16, 16)
    found, expected = (f(x) for f in (torch.compile(model, backend="aot_eager", fullgraph=True), model))
    pair = (found, expected) if isinstance(model, BSplineKAN) else (found.logits, expected.logits)
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


def test_replaced_models_still_have_their_neurons() -> None:
    model = replace(vit()).model
    assert [site.width for site in find_sites(model)] == [64, 64]
    with torch.no_grad(), capture(model) as seen:
        model(torch.randn(1, 3, 16, 16))
    assert len(seen) == 2


def test_replace_says_what_it_leaves() -> None:
    torch.manual_seed(0)
    act = nn.GELU()
    net = nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 16), act, nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    changes = replace(net)
    assert changes.changed == ("1", "0", "3", "2")
    assert changes.left == {"4": "its 12 neurons do not divide into 8 groups"}
    x = torch.randn(50, 8) / 2
    torch.testing.assert_close(changes.model(x), net(x), atol=1e-2, rtol=0)
    assert replace(net, where=lambda name, module: name == "3", groups=4).changed == ("3", "2")
    assert replace(net, groups=3).changed == ("5",)  # 16 inputs are not in 3 groups
    assert "16 inputs" in replace(net, groups=3).left["4"]

    for wrong in ({"groups": 0}, {"share": "all"}, {"denominator": "C"}):
        with pytest.raises(ValueError, match="expected"):
            replace(net, **wrong)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.act(self.b(self.act(self.a(x)))))

    left = replace(Twice()).left
    assert len(left) == 2
    assert all("act serves other layers too" in why for why in left.values())
    functional = nn.TransformerEncoderLayer(16, 2, 32)
    assert all("no module" in why for why in replace(functional).left.values())


def test_replace_in_gated_and_fused_models() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, intermediate_size=48)).eval()
    changes = replace(llama)
    assert changes.changed == ("model.layers.0.mlp.act_fn",)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(changes.model(ids).logits, llama(ids).logits, atol=1e-4, rtol=0)
    special = {"bos_token_id": 0, "eos_token_id": 1}
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=64, **special))
    changes = replace(gpt2)
    assert changes.changed == ("transformer.h.0.mlp.act",)
    assert "Conv1D" in changes.left["transformer.h.0.mlp.c_fc"]


def test_replace_warns_of_inputs_beyond_the_fit() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 2)).train()
    x = torch.randn(100, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(net, inputs=x)
    with pytest.warns(UserWarning, match="lie outside"):
        replace(net, inputs=(50 * x,))
    assert all(module.training for module in net.modules())
    small = replace(vit(), inputs={"pixel_values": torch.randn(2, 3, 16, 16)})
    assert len(small.changed) == 4


# --- the spline layer ----------------------------------------------------------------------------


def test_splines_are_those_of_scipy() -> None:
    layer = BSplineKAN(3, 2, grid=4, order=3, grid_range=(-2.0, 1.0), dtype=torch.float64)
    x = torch.linspace(-3.9, 2.9, 301, dtype=torch.float64)
    basis = bspline_basis(x, layer.knots, 3).numpy()
    knots = layer.knots.numpy()
    for k in range(7):
        peer = BSpline.basis_element(knots[k : k + 5], extrapolate=False)(x.numpy())
        np.testing.assert_allclose(basis[:, k], np.nan_to_num(peer), atol=1e-12)
    inside = (x > -2) & (x < 1)
    np.testing.assert_allclose(basis[inside.numpy()].sum(1), 1, atol=1e-12)


def test_the_spline_layer() -> None:
    torch.manual_seed(0)
    layer = BSplineKAN(3, 2, dtype=torch.float64)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 2 * (3 + 3 + 2) + 2
    x = draw(0, 5, 3)
    edges = (layer.coefficients[None] * bspline_basis(x, layer.knots, 3)[:, None]).sum(-1)
    expected = (layer.base_weight * F.silu(x)[:, None] + layer.spline_weight * edges).sum(-1) + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x.requires_grad_(), *layer.parameters()))
    assert BSplineKAN(3, 2, bias=False).bias is None
    with pytest.raises(ValueError, match="expected 3"):
        layer(draw(0, 5, 4))
    with pytest.raises(ValueError, match="range from low to high"):
        BSplineKAN(3, 2, grid_range=(1.0, -1.0))


def test_the_splines_initial_values_do_not_keep_the_variance() -> None:
    torch.manual_seed(0)
    layer = BSplineKAN(256, 256)
    with torch.no_grad():
        layer.base_weight.zero_()
        splines = float(layer(torch.randn(2000, 256)).square().mean())
    # 256 inputs each add 0.01 E[sum B_k^2], with E[sum B_k^2] between 0 and 1, whatever the size of the input.
    assert 256 * 0.01 * 0.1 < splines < 256 * 0.01
