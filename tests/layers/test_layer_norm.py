"""Layer normalization: torch's layer norm, torch's recurrent networks, Table 1 of the paper, and padded sequences."""

import copy
import warnings
from collections.abc import Callable, Iterator

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from neuropil.layers._layer_norm_core import standardise
from neuropil.layers.layer_norm import (
    LayerNorm,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLinear,
    LayerNormLSTM,
    LayerNormLSTMCell,
    LayerNormRNN,
    LayerNormRNNCell,
    add_layer_norm,
    fisher_metric,
    invariance_report,
    layer_norm,
)

CORE = 2  # time and features
NETWORKS = (LayerNormRNN, LayerNormGRU, LayerNormLSTM)
CELLS = (LayerNormRNNCell, LayerNormGRUCell, LayerNormLSTMCell)


def specimen(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A small two-layer LN-LSTM in both directions, and a batch of three sequences of five steps."""
    torch.manual_seed(seed)
    return LayerNormLSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True), (torch.randn(3, 5, 4),)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(module: nn.Module, seed: int = 9, size: float = 0.3) -> nn.Module:
    """The module with all gains and biases away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


# --- the norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_equals_torch_forward_and_backward(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """The module, and the equation written out, against `torch.nn.LayerNorm`: values and all three gradients."""
    theirs = shaken(nn.LayerNorm(shape, dtype=dtype))
    ours = LayerNorm(shape, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    weigh = draw(3, 4, 6, *shape, dtype=dtype)

    def gradients(f: Callable[[Tensor], Tensor], module: nn.Module) -> list[Tensor]:
        x = draw(1, 4, 6, *shape, dtype=dtype).requires_grad_()
        out = f(x)
        return [out, *torch.autograd.grad((out * weigh).sum(), [x, module.weight, module.bias])]

    def written_out(x: Tensor) -> Tensor:
        return standardise(x, len(shape), ours.eps) * ours.weight + ours.bias

    expected = gradients(theirs, theirs)
    for found in (gradients(ours, ours), gradients(written_out, ours)):
        for a, b in zip(found, expected, strict=True):
            # Gradients of gain and bias are sums over 24 rows, of size about 5.
            size = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("eps_mode", ["var", "std"])
def test_gradcheck(eps_mode: str) -> None:
    module = shaken(LayerNorm(5, eps_mode=eps_mode, dtype=torch.float64))
    x = draw(0, 3, 5).requires_grad_()

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(x, (5,), weight, bias, 1e-2, module.eps_mode)

    assert torch.autograd.gradcheck(run, (x, module.weight, module.bias))
    assert torch.autograd.gradgradcheck(run, (x, module.weight, module.bias))


@pytest.mark.parametrize("units", [2, 3, 100])
@pytest.mark.parametrize("eps_mode", ["var", "std"])
def test_every_row_has_mean_0_and_variance_1(units: int, eps_mode: str) -> None:
    y = LayerNorm(units, eps=0.0, eps_mode=eps_mode, dtype=torch.float64)(5 * draw(0, 20, units) + 3)
    torch.testing.assert_close(y.mean(1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)


def test_eps_is_added_to_the_variance_or_to_the_deviation() -> None:
    x = torch.tensor([[0.0, 2.0]])  # deviation 1
    assert LayerNorm(2, eps=3.0)(x).tolist() == [[-0.5, 0.5]]
    assert LayerNorm(2, eps=3.0, eps_mode="std")(x).tolist() == [[-0.25, 0.25]]


def test_two_units_give_their_order_a_constant_row_the_bias_one_unit_too() -> None:
    module = shaken(LayerNorm(2, eps=0.0, dtype=torch.float64))
    x = draw(0, 9, 2)
    sign = torch.sign(x[:, 0] - x[:, 1])
    torch.testing.assert_close(module(x), torch.stack([sign, -sign], 1) * module.weight + module.bias)
    for eps_mode in ("var", "std"):
        module = shaken(LayerNorm(4, eps_mode=eps_mode))
        x = torch.full((1, 4), 7.0, requires_grad=True)
        y = module(x)
        assert torch.equal(y[0], module.bias)
        y[0, 0].backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
    with pytest.warns(UserWarning, match="one unit"):
        single = shaken(LayerNorm(1))
    assert torch.equal(single(torch.tensor([[3.0], [8.0]])), single.bias.expand(2, 1))


def test_twice_is_once() -> None:
    module = LayerNorm(6, eps=0.0, dtype=torch.float64)
    once = module(draw(0, 5, 6))
    torch.testing.assert_close(module(once), once, rtol=0, atol=1e-12)


def test_an_example_does_not_depend_on_its_batch_nor_on_the_mode() -> None:
    module = shaken(LayerNorm(33))
    x = draw(0, 16, 33, dtype=torch.float32)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    y = module(x)
    assert torch.equal(module(x[order]), y[order])
    assert all(torch.equal(module(x[i : i + 1]), y[i : i + 1]) for i in range(16))
    assert torch.equal(module.eval()(x), y)
    x[3, 5] = torch.nan
    bad = module(x).isnan().all(1)
    assert bad.tolist() == [i == 3 for i in range(16)]


@pytest.mark.parametrize("eps_mode", ["var", "std"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, eps_mode: str) -> None:
    x = (draw(0, 4, 4096) * 100 + 300).to(dtype)  # squares are beyond float16's 65504
    y = LayerNorm(4096, eps_mode=eps_mode, dtype=dtype)(x)
    assert y.dtype == dtype
    exact = standardise(x.double(), 1)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_errors_of_the_norm() -> None:
    with pytest.raises(ValueError, match=r"input of shape \(2, 4\); expected its last dimensions to be \(5,\)"):
        LayerNorm(5)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected its last dimensions"):
        LayerNorm((2, 3, 4))(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="int64"):
        LayerNorm(5)(torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(TypeError, match="int64"):
        LayerNormLinear(5, 3)(torch.zeros(2, 5, dtype=torch.int64))
    for wrong in ({"eps": -1.0}, {"eps_mode": "sum"}):
        with pytest.raises(ValueError, match="eps"):
            LayerNorm(5, **wrong)
    for shape in (0, (), (3, 0)):
        with pytest.raises(ValueError, match="normalized_shape"):
            LayerNorm(shape)


def test_options_of_torch() -> None:
    assert not list(LayerNorm(4, elementwise_affine=False).parameters())
    assert [n for n, _ in LayerNorm(4, bias=False).named_parameters()] == ["weight"]
    x = draw(0, 2, 4, dtype=torch.float32)
    assert torch.equal(LayerNorm(4, elementwise_affine=False)(x), F.layer_norm(x, (4,)))


# --- the geometry --------------------------------------------------------------------------------

TABLE = {  # matrix re-scaled, re-centred, vector re-scaled, data re-scaled, re-centred, one case re-scaled
    "batch": (True, False, True, True, True, False),
    "weight": (True, False, True, False, False, False),
    "layer": (True, True, False, True, False, True),
    "rms": (True, False, False, True, False, True),  # without the mean, re-centring is lost
    "none": (False, False, False, False, False, False),
}


def normed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(5, 8, bias=False)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: nn.Sequential(linear, nn.BatchNorm1d(8)),
        "weight": lambda: weight_norm(linear),
        "layer": lambda: shaken(LayerNormLinear(5, 8)),
        "rms": lambda: nn.Sequential(linear, nn.RMSNorm(8)),
        "none": lambda: linear,
    }
    return kinds[kind]()


@pytest.mark.parametrize("kind", TABLE)
def test_invariances_of_table_1(kind: str) -> None:
    layer = normed(kind)
    before = copy.deepcopy(layer.state_dict())
    report = invariance_report(layer)
    for (name, change), invariant in zip(report.items(), TABLE[kind], strict=True):
        assert change < 1e-10 if invariant else change > 1e-2, (name, change)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_the_report_wants_one_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"2 nn\.Linear"):
        invariance_report(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3)))


def test_gradients_are_orthogonal_to_what_the_norm_ignores() -> None:
    layer = shaken(LayerNormLinear(5, 8, nonlinearity=torch.tanh, eps=0.0, dtype=torch.float64))
    x, target = draw(1, 20, 5), draw(2, 20, 8)
    ((layer(x) - target) ** 2).sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    assert abs(float((layer.weight.detach() * gradient).sum())) < 1e-10  # re-scaling
    torch.testing.assert_close(gradient.sum(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)  # re-centring
    a = (x @ layer.weight.T).detach().requires_grad_()
    ((layer.norm(a) - target) ** 2).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad.sum(1), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-10)
    along = (a.grad * (a - a.mean(1, keepdim=True))).sum(1)
    torch.testing.assert_close(along, torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-10)


def softmax_covariance(eta: Tensor) -> Tensor:
    p = eta.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def test_doubled_weights_halve_the_gradient_and_quarter_the_metric() -> None:
    layer = shaken(LayerNormLinear(5, 4, eps=0.0, dtype=torch.float64))
    double = copy.deepcopy(layer)
    with torch.no_grad():
        double.weight *= 2
    x = draw(1, 20, 5)
    outs = [each(x) for each in (layer, double)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(o.square().sum(), m.weight)[0] for o, m in zip(outs, (layer, double), strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0] / 2, rtol=1e-12, atol=1e-13)
    for across in (False, True):
        one, two = (fisher_metric(m, x, softmax_covariance, across_units=across) for m in (layer, double))
        torch.testing.assert_close(two[:, :5, :, :5], one[:, :5, :, :5] / 4, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(two[:, -1, :, -1], one[:, -1, :, -1], rtol=1e-10, atol=1e-14)
        scaled = fisher_metric(layer, 3 * x, softmax_covariance, across_units=across)
        torch.testing.assert_close(scaled[:, -1, :, -1], one[:, -1, :, -1], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("eps_mode", ["var", "std"])
def test_metric_is_the_fisher_information(eps_mode: str) -> None:
    """Against scores differentiated by autograd; the paper's form, with the other units' outputs held still."""
    layer = shaken(LayerNormLinear(3, 4, eps=0.1, eps_mode=eps_mode, dtype=torch.float64))
    x = draw(1, 6, 3)
    names = ("weight", "norm.bias", "norm.weight")

    def eta(w: Tensor, b: Tensor, g: Tensor, row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, (w, b, g), strict=True)), (row,))

    w, b, g = layer.weight.detach(), layer.norm.bias.detach(), layer.norm.weight.detach()
    expected = torch.zeros(2, 4, 5, 4, 5, dtype=torch.float64)
    for row in x:
        dw, db, dg = torch.func.jacrev(eta, argnums=(0, 1, 2))(w, b, g, row)  # [k, i, 3], [k, i], [k, i]
        jacobian = torch.cat([dw, db[..., None], dg[..., None]], -1)
        own = jacobian * torch.eye(4, dtype=torch.float64)[..., None]
        cov = softmax_covariance(layer(row[None]))[0] / 2.0**2
        for number, j in enumerate((own, jacobian)):
            expected[number] += torch.einsum("kip,kl,ljq->ipjq", j, cov, j).detach() / len(x)
    for across in (False, True):
        found = fisher_metric(layer, x, softmax_covariance, dispersion=2.0, across_units=across)
        torch.testing.assert_close(found, expected[int(across)], rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="nonlinearity"):
        fisher_metric(LayerNormLinear(3, 4, nonlinearity=torch.relu), x, softmax_covariance)


# --- recurrent networks --------------------------------------------------------------------------


def without_norms(network: nn.Module) -> nn.Module:
    for name, module in list(network.named_modules()):
        if isinstance(module, LayerNorm):
            network.set_submodule(name, nn.Identity())
    return network


def loaded(ours: nn.Module, theirs: nn.RNNBase) -> None:
    """torch's weights into our cells, with zero recurrent biases where ours have no place for them."""
    with torch.no_grad():
        for number, cell in enumerate(ours.cells):
            tail = f"_l{number // ours.directions}" + ("_reverse" if number % ours.directions else "")
            cell.weight_ih.copy_(getattr(theirs, f"weight_ih{tail}"))
            cell.weight_hh.copy_(getattr(theirs, f"weight_hh{tail}"))
            if isinstance(cell, LayerNormLSTMCell):
                cell.bias.copy_(getattr(theirs, f"bias_ih{tail}") + getattr(theirs, f"bias_hh{tail}"))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_without_norms_they_are_torchs(kind: str, layers: int, bidirectional: bool, batch_first: bool) -> None:
    """Values, last states, and the order and shape of everything; from given initial states and from none."""
    torch.manual_seed(0)
    options = {
        "num_layers": layers,
        "bidirectional": bidirectional,
        "batch_first": batch_first,
        "dtype": torch.float64,
        "bias": kind == "LSTM",
    }
    theirs = getattr(nn, kind)(4, 6, **options)
    code = {"update": "code"} if kind == "GRU" else {}
    ours = without_norms(globals()[f"LayerNorm{kind}"](4, 6, **options, **code))
    loaded(ours, theirs)
    h = draw(1, layers * (2 if bidirectional else 1), 3, 6)
    start = (h, draw(2, *h.shape)) if kind == "LSTM" else h
    x = draw(0, 3, 7, 4) if batch_first else draw(0, 7, 3, 4)
    for hx in (None, start):
        torch.testing.assert_close(ours(x, hx), theirs(x, hx), rtol=1e-12, atol=1e-12)
    alone = x[0] if batch_first else x[:, 0]
    torch.testing.assert_close(ours(alone), theirs(alone), rtol=1e-12, atol=1e-12)
    first = (start[0][:, 0], start[1][:, 0]) if kind == "LSTM" else start[:, 0]
    torch.testing.assert_close(ours(alone, first), theirs(alone, first), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_packed_sequences_are_torchs_too(network: type[nn.Module]) -> None:
    """Sorted and unsorted: the same data, the same order, the same last states as each sequence alone."""
    torch.manual_seed(0)
    ours = shaken(network(4, 6, num_layers=2, bidirectional=True, dtype=torch.float64))
    for lengths, enforce in (((7, 4, 1), True), ((2, 7, 5), False)):
        sequences = [draw(i, n, 4) for i, n in enumerate(lengths)]
        packed = pack_sequence(sequences, enforce_sorted=enforce)
        out, state = ours(packed)
        assert isinstance(out, PackedSequence)
        assert torch.equal(out.batch_sizes, packed.batch_sizes)
        for name in ("sorted_indices", "unsorted_indices"):
            a, b = getattr(out, name), getattr(packed, name)
            assert (a is None and b is None) or torch.equal(a, b)
        padded, _ = pad_packed_sequence(out)
        for i, sequence in enumerate(sequences):
            alone, alone_state = ours(sequence)
            torch.testing.assert_close(padded[: len(sequence), i], alone, rtol=1e-12, atol=1e-12)
            for a, b in zip(*((s if isinstance(s, tuple) else (s,)) for s in (state, alone_state)), strict=True):
                torch.testing.assert_close(a[:, i], b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="packed"):
        ours(packed, mask=torch.ones(7, 3, dtype=torch.bool))


def test_packed_order_of_initial_states_is_torchs() -> None:
    torch.manual_seed(0)
    theirs = nn.LSTM(4, 6, batch_first=True, dtype=torch.float64)
    ours = without_norms(LayerNormLSTM(4, 6, batch_first=True, dtype=torch.float64))
    loaded(ours, theirs)
    x = pack_padded_sequence(draw(0, 3, 7, 4), torch.tensor([2, 7, 5]), batch_first=True, enforce_sorted=False)
    start = (draw(1, 1, 3, 6), draw(2, 1, 3, 6))
    (a, a_state), (b, b_state) = ours(x, start), theirs(x, start)
    torch.testing.assert_close(a.data, b.data, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a_state, b_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_masked_steps_leave_the_state(network: type[nn.Module], batch_first: bool) -> None:
    torch.manual_seed(0)
    ours = shaken(network(4, 6, batch_first=batch_first, dtype=torch.float64))
    x, mask = draw(0, 3, 7, 4), torch.ones(3, 7, dtype=torch.bool)
    mask[0, 5:] = mask[1, 2:4] = False
    x[~mask] = torch.nan  # what is not to be read does no harm
    out, _ = ours(x, mask=mask) if batch_first else ours(x.transpose(0, 1), mask=mask.T)
    out = out if batch_first else out.transpose(0, 1)
    assert torch.equal(out[0, 5], out[0, 4])
    assert torch.equal(out[0, 6], out[0, 4])
    assert torch.equal(out[1, 2], out[1, 1])
    for i in range(3):
        alone, _ = ours(x[i, mask[i]])
        torch.testing.assert_close(out[i, mask[i]], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch_first", [False, True])
def test_any_number_of_batch_dimensions(batch_first: bool) -> None:
    torch.manual_seed(0)
    ours = shaken(LayerNormLSTM(4, 6, num_layers=2, batch_first=batch_first, dtype=torch.float64))
    x = draw(0, 2, 3, 7, 4)
    mask = draw(1, 2, 3, 7) > 0
    start = (draw(2, 2, 2, 3, 6), draw(3, 2, 2, 3, 6))
    given = (x, mask) if batch_first else (x.movedim(-2, 0), mask.movedim(-1, 0))
    out, (h, c) = ours(given[0], start, given[1])
    out = out if batch_first else out.movedim(0, -2)
    for i in range(2):
        part = (x[i], mask[i]) if batch_first else (x[i].movedim(-2, 0), mask[i].movedim(-1, 0))
        flat, (h_i, c_i) = ours(part[0], (start[0][:, i], start[1][:, i]), part[1])
        torch.testing.assert_close(out[i], flat if batch_first else flat.movedim(0, -2), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((h[:, i], c[:, i]), (h_i, c_i), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("network", "cell", "options"),
    [
        (LayerNormRNN, LayerNormRNNCell, {"nonlinearity": "relu"}),
        (LayerNormGRU, LayerNormGRUCell, {"update": "paper"}),
        (LayerNormLSTM, LayerNormLSTMCell, {"variant": "paper"}),
        (LayerNormLSTM, LayerNormLSTMCell, {"variant": "draw"}),
        (LayerNormLSTM, LayerNormLSTMCell, {"variant": "separate-gates"}),
    ],
)
def test_a_network_is_its_cell_step_by_step(network: type[nn.Module], cell: type[nn.Module], options: dict) -> None:
    torch.manual_seed(0)
    whole = shaken(network(4, 6, **options))
    step = cell(4, 6, **options)
    step.load_state_dict(whole.cells[0].state_dict())
    x, state, outs = draw(0, 5, 3, 4, dtype=torch.float32), None, []
    for frame in x:
        state = step(frame, state)
        outs.append(state[0] if isinstance(state, tuple) else state)
    torch.testing.assert_close(whole(x)[0], torch.stack(outs))


def test_the_equations_of_the_paper() -> None:
    """One step of each cell against its equation written with torch's own functions."""
    x, h, c = draw(0, 3, 4), draw(1, 3, 6), draw(2, 3, 6)

    def ln(a: Tensor, norm: nn.Module) -> Tensor:
        return (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + (
            norm.bias
        )

    rnn = shaken(LayerNormRNNCell(4, 6, dtype=torch.float64))
    torch.testing.assert_close(rnn(x, h), torch.tanh(ln(h @ rnn.weight_hh.T + x @ rnn.weight_ih.T, rnn.norm)))

    gru = shaken(LayerNormGRUCell(4, 6, dtype=torch.float64))
    gates = ln(h @ gru.weight_hh[:12].T, gru.norm_hh) + ln(x @ gru.weight_ih[:12].T, gru.norm_ih)
    r, z = gates[:, :6].sigmoid(), gates[:, 6:].sigmoid()
    new = ln(x @ gru.weight_ih[12:].T, gru.norm_candidate_ih)
    new = torch.tanh(new + r * ln(h @ gru.weight_hh[12:].T, gru.norm_candidate_hh))
    torch.testing.assert_close(gru(x, h), (1 - z) * h + z * new)
    gru.update = "code"
    torch.testing.assert_close(gru(x, h), z * h + (1 - z) * new)

    for variant in ("paper", "separate-gates", "draw"):
        lstm = shaken(LayerNormLSTMCell(4, 6, variant=variant, dtype=torch.float64))
        a_h, a_x = h @ lstm.weight_hh.T, x @ lstm.weight_ih.T
        if variant == "paper":
            a_h, a_x = ln(a_h, lstm.norm_hh), ln(a_x, lstm.norm_ih)
        if variant == "separate-gates":
            for a, norm in ((a_h, lstm.norm_hh), (a_x, lstm.norm_ih)):
                a.copy_(F.group_norm(a, 4, norm.weight, norm.bias))
        i, f, g, o = (a_h + a_x + lstm.bias).chunk(4, 1)
        c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * torch.tanh(ln(c_new, lstm.norm_cell))
        torch.testing.assert_close(lstm(x, (h, c)), (h_new, c_new))


def test_gates_of_either_sign_make_the_same_gru() -> None:
    torch.manual_seed(0)
    paper = shaken(LayerNormGRU(4, 6, dtype=torch.float64))
    code = LayerNormGRU(4, 6, update="code", dtype=torch.float64)
    code.load_state_dict(paper.state_dict())
    with torch.no_grad():
        for norm in (code.cells[0].norm_ih, code.cells[0].norm_hh):
            norm.weight[6:] *= -1
            norm.bias[6:] *= -1
    x = draw(0, 7, 3, 4)
    torch.testing.assert_close(paper(x), code(x), rtol=1e-12, atol=1e-12)


def test_summed_inputs_keep_unit_variance_for_2000_steps() -> None:
    torch.manual_seed(0)
    rnn = LayerNormRNN(4, 16, eps=0.0, dtype=torch.float64)
    seen: list[Tensor] = []
    rnn.cells[0].norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        rnn.cells[0].weight_hh *= 30  # a plain network would saturate
        rnn(draw(0, 2000, 1, 4))
    a = torch.cat(seen)
    assert len(a) == 2000
    torch.testing.assert_close(a.var(1, correction=0), torch.ones(2000, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_scaled_weights_leave_every_state(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    ours = network(4, 6, eps=0.0, dtype=torch.float64)
    h = draw(3, 1, 3, 6)  # not zero: the norm of a zero state has no deviation
    start = (h, draw(4, 1, 3, 6)) if network is LayerNormLSTM else h
    before, _ = ours(draw(0, 9, 3, 4), start)
    with torch.no_grad():
        ours.cells[0].weight_hh *= 10
        ours.cells[0].weight_ih *= 10
    after, _ = ours(draw(0, 9, 3, 4), start)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    cell = LayerNormLSTMCell(400, 50)
    for gate in cell.weight_hh.split(50):
        torch.testing.assert_close(gate @ gate.T, torch.eye(50), rtol=0, atol=1e-5)
    assert abs(float(cell.weight_ih.detach().std()) - 0.05) < 0.001
    assert float(cell.bias.detach().abs().max()) == 0
    assert torch.equal(cell.norm_cell.weight, torch.ones(50))
    for each in CELLS:
        shaky = shaken(each(4, 6))
        before = {k: v.clone() for k, v in shaky.state_dict().items()}
        shaky.reset_parameters()
        assert not any(torch.equal(v, before[k]) for k, v in shaky.state_dict().items())


@pytest.mark.parametrize("network", NETWORKS)
def test_without_bias_there_are_gains_only(network: type[nn.Module]) -> None:
    ours = network(4, 6, num_layers=2, bias=False)
    assert not [n for n, _ in ours.named_parameters() if n.endswith("bias")]
    assert bool(ours(torch.zeros(5, 2, 4))[0].isfinite().all())


def test_dropout_acts_between_layers_in_training_alone() -> None:
    torch.manual_seed(0)
    ours = LayerNormGRU(4, 6, num_layers=2, dropout=0.5)
    x = draw(0, 5, 3, 4, dtype=torch.float32)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert torch.equal(ours(x)[0], ours(x)[0])
    below = ours.cells[0]
    torch.testing.assert_close(ours(x)[1][0], ours.train()(x)[1][0])  # the first layer has nothing dropped
    assert below.input_size == 4


def test_errors_of_the_networks() -> None:
    lstm = LayerNormLSTM(4, 6)
    with pytest.raises(ValueError, match="with 4 inputs"):
        lstm(torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match="one time or more"):
        lstm(torch.zeros(0, 2, 4))
    with pytest.raises(TypeError, match="int64"):
        lstm(torch.zeros(5, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial state of shape \(1, 3, 6\); expected \(1, 2, 6\)"):
        lstm(torch.zeros(5, 2, 4), (torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)))
    with pytest.raises(ValueError, match=r"mask of shape \(2, 5\); expected \(5, 2\)"):
        lstm(torch.zeros(5, 2, 4), mask=torch.ones(2, 5, dtype=torch.bool))
    cell = LayerNormGRUCell(4, 6)
    with pytest.raises(ValueError, match="expected 4 in its last dimension"):
        cell(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="int64"):
        cell(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"state of shape \(2, 5\)"):
        cell(torch.zeros(2, 4), torch.zeros(2, 5))
    for make, words in (
        (lambda: LayerNormLSTM(0, 6), "input_size"),
        (lambda: LayerNormLSTM(4, 6, num_layers=0), "num_layers"),
        (lambda: LayerNormLSTM(4, 6, num_layers=2, dropout=1.5), "dropout"),
        (lambda: LayerNormLSTM(4, 6, dropout=0.5), "between layers"),
        (lambda: LayerNormLSTM(4, 6, variant="lua"), "variant"),
        (lambda: LayerNormGRU(4, 6, update="lua"), "update"),
        (lambda: LayerNormRNN(4, 6, nonlinearity="gelu"), "nonlinearity"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


@pytest.mark.parametrize(
    "make", [lambda: LayerNormRNN(3, 4), lambda: LayerNormGRU(3, 4), lambda: LayerNormLSTM(3, 4, variant="draw")]
)
def test_gradcheck_of_the_networks(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    ours = shaken(make().double())
    names, values = zip(*ours.named_parameters(), strict=True)
    x = draw(0, 3, 2, 3).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@pytest.fixture
def _unchecked() -> Iterator[None]:
    """The compiler cannot look into jaxtyping's checks of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("network", NETWORKS)
def test_compiled_whole(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    ours = shaken(network(4, 6))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, mask = draw(0, 3, 2, 4, dtype=torch.float32), torch.tensor([[True, True], [True, False], [True, False]])
    torch.testing.assert_close(compiled(x, None, mask)[0], ours(x, None, mask)[0])


# --- the converter -------------------------------------------------------------------------------


def test_every_linear_layer_is_changed_or_named() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), shared, shared, nn.Linear(8, 1), nn.Linear(1, 3))
    before = copy.deepcopy(model.state_dict())
    changes = add_layer_norm(model)
    assert changes.changed == ("0", "2")
    assert set(changes.left) == {"4", "5"}
    assert "one unit" in changes.left["4"]
    assert "last" in changes.left["5"]
    new = changes.model
    assert isinstance(new[2], LayerNormLinear)
    assert new[2] is new[3]
    assert all(torch.equal(new.state_dict()[k], v) for k, v in before.items())
    assert not any(isinstance(m, LayerNormLinear) for m in model.modules())
    x = draw(0, 5, 4, dtype=torch.float32)
    h = F.layer_norm(model[0](x), (8,)).relu()
    for _ in range(2):
        h = F.layer_norm(model[2](h), (8,))
    torch.testing.assert_close(new(x), model[5](model[4](h)))
    again = add_layer_norm(new)
    assert again.left["0"] == "already normalised"


def test_where_decides_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    changes = add_layer_norm(model, where=lambda name, module: name == "1")
    assert changes.changed == ("1",)
    assert changes.left == {"0": "not chosen by `where`"}
    alone = add_layer_norm(nn.Linear(4, 8), where=lambda name, module: True)
    assert isinstance(alone.model, LayerNormLinear)


def test_layers_that_are_read_and_not_called_are_left() -> None:
    changes = add_layer_norm(nn.TransformerEncoderLayer(8, 2, 16), where=lambda name, module: True)
    assert changes.changed == ()
    assert set(changes.left) == {"self_attn.out_proj", "linear1", "linear2"}
    normed = add_layer_norm(nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3)))
    assert "ParametrizedLinear" in normed.left["0"]


def test_a_converted_model_learns() -> None:
    from neuropil.data import digits

    data = digits()
    torch.manual_seed(0)
    model = add_layer_norm(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))).model
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for start in range(0, 1400, 4):  # once through, four at a time
        optimizer.zero_grad()
        batch = slice(start, start + 4)
        F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
    accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean()
    assert accuracy > 0.85


def test_no_warning_for_ordinary_use() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, inputs = specimen()
        model(*inputs)
