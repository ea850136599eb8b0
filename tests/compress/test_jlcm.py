"""Learned codebooks: the sheet's invariants, closed forms, re-ordered networks of every sort, files, bad input."""

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import llama
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from neuropil.changes import Changes
from neuropil.compress import _jlcm_kmeans as kmeans
from neuropil.compress import learn_codebooks, quantize_model
from neuropil.compress._jlcm_mapping import PHI, CodebookWeight, SharedAdam, chosen, closeness, nearest
from neuropil.compress._jlcm_order import columns, reorder, runs
from neuropil.compress._jlcm_solve import by_outputs, by_weights
from neuropil.compress.jlcm import codebook_bits, partial_sums, size_report
from neuropil.compress.quantize.nonuniform import kmeans as lloyd
from neuropil.compress.quantize.tiles import QuantizationError
from neuropil.compress.reconstruction import ReconstructionError, output_error, walk
from neuropil.models import load
from neuropil.models.packed_files import FILE, load_packed, save_packed
from neuropil.models.stores import safetensors_header
from neuropil.packed import Lookup, nbytes, packed_modules, unpack


def specimen(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], Changes], tuple[Tensor, ...]]:
    """A model with a layer of each sort, one of them left, the transform with learning, and the model's input."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6), nn.Conv1d(5, 3, 1))
    x = torch.arange(40).view(8, 5) % 20

    def act(m: nn.Module) -> Changes:
        return learn_codebooks(m, 2, 2, calibration=[x], steps=5, skip=["1"])

    return model, act, (x,)


def cnn(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU(8), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(6 * 9, 10), nn.LayerNorm(10), nn.GELU(), nn.Linear(10, 3)),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval().to(dtype)


def images(rows: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 1, 10, 10, generator=torch.Generator().manual_seed(3)).to(dtype)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out[0]


# -------------------------------------------------------------------------------------------- re-ordering (1)

IDS = torch.arange(12)[None] % 11
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def network(name: str) -> tuple[nn.Module, Tensor, int]:
    """A model in double precision, its input, and how many runs of rows can be put in another order."""
    torch.manual_seed(0)
    double = torch.float64
    if name == "cnn":
        return cnn(dtype=double), images(dtype=double), 3
    if name == "llama":  # two heads read one value head
        return llama().eval().double(), IDS, 2 * llama().config.num_hidden_layers
    if name == "bert":
        return BertModel(BertConfig(**SMALL, vocab_size=50)).eval().double(), IDS, 4
    config = ViTConfig(**SMALL, image_size=16, patch_size=4)
    return ViTModel(config).eval().double(), torch.randn(2, 3, 16, 16, dtype=double), 4


def order_of(run: Any, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = run.head or run.rows
    each = [torch.randperm(size, generator=generator) + start for start in range(0, run.rows, size)]
    return torch.cat(each)


@pytest.mark.parametrize("name", ["cnn", "llama", "bert", "vit"])
def test_another_order_computes_the_same(name: str) -> None:
    model, x, count = network(name)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += torch.randn_like(p) / 10  # so that biases and norms tell neurons apart
    before, state = answer(model, x), copy.deepcopy(model.state_dict())
    found = runs(model)
    assert len(found) == count
    orders = [order_of(run, i) for i, run in enumerate(found)]
    for run, order in zip(found, orders, strict=True):
        reorder(model, run, order)
        weight = model.get_submodule(run.layers[0]).weight
        assert torch.equal(weight, state[f"{run.layers[0]}.weight"][order][:, : weight.shape[1]]) or run.layers[0] in [
            r.reader for r in found
        ]
    torch.testing.assert_close(answer(model, x), before, rtol=0, atol=1e-12)
    for run, order in zip(found, orders, strict=True):
        reorder(model, run, order.argsort())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_an_order_of_heads_is_that_of_the_queries() -> None:
    model, _, _ = network("llama")
    run = next(run for run in runs(model) if run.head)
    at = columns(run, torch.arange(run.rows))
    assert torch.equal(at, torch.arange(run.rows * run.repeat))
    with pytest.raises(ValueError, match="within heads"):
        reorder(model, run, torch.arange(run.rows).roll(1))
    with pytest.raises(ValueError, match="once"):
        reorder(model, run, torch.zeros(run.rows, dtype=torch.int64))


class Branched(nn.Module):
    """What `first` answers is read twice; what `third` answers has groups in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.third, self.norm, self.last = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        out: Tensor = self.last(self.norm(self.third(h + self.second(h))))
        return out


def test_what_cannot_change_places_stays() -> None:
    torch.manual_seed(0)
    model, x = Branched(), images()
    assert runs(model) == []
    changes = learn_codebooks(model, 8, 2, dtype=torch.float32)
    torch.testing.assert_close(answer(changes.model, x), answer(model, x), rtol=0.02, atol=0.02)
    assert all(packing.owner is not None for _, _, packing in lookups(changes.model))


def test_partners_are_taken_on_trust_and_checked_on_the_data() -> None:
    torch.manual_seed(0)
    model, x = Branched(), images()
    with pytest.warns(UserWarning, match="changes its answers"):
        changes = learn_codebooks(model, 4, 2, calibration=[x], steps=1, partners={"third": "last"})
    plain = learn_codebooks(model, 4, 2, calibration=[x], steps=1)
    assert torch.equal(answer(changes.model, x), answer(plain.model, x))
    model.norm = nn.GroupNorm(1, 4)  # one group treats all alike
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changes = learn_codebooks(model, 4, 2, calibration=[x], steps=1, partners={"third": "last"})
    kept = {name: packing for name, _, packing in lookups(changes.model)}
    assert kept["third"].sizes is not None
    assert kept["last"].owner is not None
    with pytest.raises(ValueError, match="partners"):
        learn_codebooks(model, 4, 2, partners={"third": "norm"})


def lookups(model: nn.Module) -> list[tuple[str, nn.Module, Lookup]]:
    return [(n, m, p) for n, m, p in packed_modules(model) if isinstance(p, Lookup)]


# ------------------------------------------------------------------------------------------- k-means (2, 3, 4)


def error(x: np.ndarray, level: np.ndarray) -> float:
    return float((np.abs(x[:, None] - level).min(1) ** 2).sum())


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9), st.integers(1, 5))
def test_levels_are_the_best_there_are(values: list[int], count: int) -> None:
    x = np.sort(np.array(values, dtype=np.float64)) / 7
    cuts = (c for k in range(min(count, len(x))) for c in itertools.combinations(range(1, len(x)), k))
    best = min(sum(float(((s - s.mean()) ** 2).sum()) for s in np.split(x, list(c))) for c in cuts)
    level = kmeans.levels(x, count)
    assert len(level) <= count
    assert error(x, level) == pytest.approx(best, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_levels_are_no_worse_than_lloyds_and_uniform(seed: int, bits: int) -> None:
    w = torch.randn(16, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    level = kmeans.levels(w.numpy(), 2**bits)
    best = error(w.flatten().numpy(), level)
    assert best <= error(w.flatten().numpy(), lloyd(w.reshape(1, 1, -1), 2**bits).level.flatten().numpy()) + 1e-9
    for scheme in ("affine", "symmetric"):
        settings = {"bits": bits, "scheme": scheme, "granularity": "tensor"}
        if bits > 1 or scheme == "affine":
            model = nn.Sequential(nn.Linear(24, 16, bias=False).double())
            model[0].weight.data = w
            made = quantize_model(model, settings).model.get_submodule("0").weight
            assert best <= float((made - w).square().sum()) + 1e-9


def test_lloyds_rounds_never_raise_the_error() -> None:
    x = np.sort(np.random.default_rng(0).normal(size=500) ** 3)
    level = np.linspace(-4, 4, 8)
    settled = kmeans.settled(x, np.ones(500), level)
    assert error(x, settled) < error(x, level)
    assert error(x, kmeans.levels(x, 8)) <= error(x, settled)


def test_many_numbers_come_close_to_the_best() -> None:
    x = np.random.default_rng(0).standard_t(4, size=40_000)
    fine = kmeans.levels(x, 13)  # 40,000 are within the budget of 13 levels
    before = kmeans.BUDGET
    try:
        kmeans.BUDGET = 1
        coarse = kmeans.levels(x, 13)
    finally:
        kmeans.BUDGET = before
    assert error(x, fine) <= error(x, coarse) * (1 + 1e-12)
    assert error(x, coarse) < 1.001 * error(x, fine)


def test_few_different_weights_are_kept_to_the_bit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))
    values = torch.tensor([-1.5, -0.75, -0.5, -0.125, 0.0, 0.25, 1.0, 3.0])
    for layer in (model[0], model[2]):
        layer.weight.data = values[torch.randint(0, 8, layer.weight.shape)]
    model, x = model.double(), torch.randn(4, 24).double()
    for groups in (1, 4):
        made = learn_codebooks(model, 3, groups).model
        torch.testing.assert_close(answer(made, x), answer(model, x), rtol=0, atol=1e-12)
        assert torch.equal(made.get_submodule("2").weight.unique(), model[2].weight.unique())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 6), st.sampled_from(["codebooks", "scales"]))
def test_more_codebooks_are_never_worse(seed: int, bits: int, groups: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(12, 20, generator=generator, dtype=torch.float64)
    w = w * torch.rand(12, 1, generator=generator, dtype=torch.float64) * 3
    one = torch.zeros(12, dtype=torch.int64)
    any_owner = torch.randint(0, groups, (12,), generator=generator).unique(return_inverse=True)[1]
    for owner in (any_owner, kmeans.group(kmeans.describe(w, "quantiles"), groups)):
        assert weight_error(w, owner, 2**bits, mode) <= weight_error(w, one, 2**bits, "codebooks") + 1e-9


def weight_error(w: Tensor, owner: Tensor, count: int, mode: str) -> float:
    book, scale = by_weights(w, owner, count, mode)
    table = book if scale is None else scale * book
    return float((table[owner[:, None], nearest(table, w, owner)] - w).square().sum())


def test_scales_are_found_where_they_are_planted() -> None:
    torch.manual_seed(0)
    book, owner = torch.tensor([-2.0, -0.5, 1.0, 1.5], dtype=torch.float64), torch.arange(12) // 4
    scale = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    w = (scale[owner][:, None] * book[torch.randint(0, 4, (12, 50))]).contiguous()
    assert weight_error(w, owner, 4, "scales") < 1e-9 * float(w.square().sum())
    features = kmeans.describe(w, "std")
    assert torch.equal(kmeans.group(features, 3), owner)


@pytest.mark.parametrize("feature", kmeans.FEATURES)
def test_groups_are_of_rows_that_are_alike(feature: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, 3, (60,), generator=generator)
    w = (torch.rand(60, 200, generator=generator) - 0.5) * torch.tensor([1.0, 3.0, 6.0])[wanted][:, None]
    assert torch.equal(kmeans.group(kmeans.describe(w, feature), 3), wanted)
    even = kmeans.group(kmeans.describe(w, feature), 3, balanced=True)
    assert even.bincount().tolist() == [20, 20, 20]
    heads = kmeans.group(kmeans.describe(w, feature), 3, head=15)
    assert len({tuple(part.bincount(minlength=3).tolist()) for part in heads.split(15)}) == 1
    assert kmeans.group(torch.ones(7, 2), 3).tolist() == [0] * 7


# ------------------------------------------------------------------------------------------ sizes on disk (5, 9)


def test_the_size_is_that_of_the_formula() -> None:
    assert codebook_bits(4096, 4096, 2, 8) == 33_554_432 + 512 + 96
    assert codebook_bits(4096, 4096, 2, 8, ordered=False) == 33_554_432 + 512 + 3 * 4096


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
def test_bytes_on_disk_are_those_of_the_formula(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512, bias=False), nn.ReLU(), nn.Linear(512, 32, bias=False))
    made = learn_codebooks(model, bits, 8).model
    wanted = codebook_bits(512, 64, bits, 8) + codebook_bits(32, 512, bits, 8, ordered=False)
    assert 8 * nbytes(made) == wanted
    file = save_packed(made, tmp_path / "small") / FILE
    offsets = [entry["data_offsets"][1] for key, entry in safetensors_header(file).items() if key != "__metadata__"]
    assert 8 * max(offsets) == wanted
    report = size_report(made)
    assert (report.weights, report.nbytes, report.dense) == (512 * 96, wanted // 8, 4 * 512 * 96)
    assert str(report).startswith(f"49152 weights in {wanted / 49152:.2f} bits each")


@pytest.mark.parametrize("mode", ["codebooks", "scales"])
def test_a_file_gives_the_same_to_the_bit(mode: str, tmp_path: Path) -> None:
    model, x = cnn(), images()
    made = learn_codebooks(model, 3, {"0": 4, "*": 3}, mode=mode, calibration=[x], steps=3).model
    again = load_packed(save_packed(made, tmp_path / mode), into=cnn(1))
    assert torch.equal(answer(again, x), answer(made, x))
    unpack(again)
    assert type(again.get_submodule("0")) is nn.Conv2d
    assert torch.equal(answer(again, x), answer(made, x))


def test_sums_of_inputs_give_the_product() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 16, bias=False), nn.ReLU(), nn.Linear(16, 6)), torch.randn(2, 5, 24)
    for mode in ("codebooks", "scales"):
        for _, module, packing in lookups(learn_codebooks(model, 3, 4, mode=mode).model)[:1]:
            torch.testing.assert_close(partial_sums(packing, x), x @ module.weight.T, rtol=0, atol=1e-2)
            wide = Lookup.of(
                packing.integers(), packing.table.double(), (16, 24),
                None if packing.scale is None else packing.scale.double(), sizes=None,
                owner=packing.block(4) if packing.table.shape[0] > 1 or packing.scale is not None else None,
            )  # fmt: skip
            torch.testing.assert_close(partial_sums(wide, x.double()), x.double() @ wide.dense().T, rtol=0, atol=1e-12)
    with pytest.raises(QuantizationError, match="expected"):
        partial_sums(Lookup.of(torch.zeros(2, 2, dtype=torch.int), torch.ones(1, 2, 2, 1), (2, 2)), torch.ones(2))


# ------------------------------------------------------------------------------------------- gradients (6, 7, 8)


def mapped(groups: int = 3, count: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(groups, count, generator=generator, dtype=torch.float64)
    scores = torch.randn(7, 6, count, generator=generator, dtype=torch.float64)
    return table, scores, torch.tensor([0, 0, 1, 2, 2, 2, 1]) % groups


@pytest.mark.parametrize("gradient", ["plain", *PHI])
def test_the_gradient_of_codewords_adds_up_over_indices(gradient: str) -> None:
    table, scores, owner = mapped()
    table.requires_grad_()
    incoming = torch.randn(7, 6, dtype=torch.float64)
    (ours,) = torch.autograd.grad((chosen(table, scores, owner, gradient) * incoming).sum(), table)
    picked = table[owner[:, None], scores.argmax(-1)]
    (theirs,) = torch.autograd.grad((picked * incoming).sum(), table)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_plain_gradient_is_that_of_the_softmax() -> None:
    table, scores, owner = mapped()
    table.requires_grad_()
    scores.requires_grad_()
    incoming = torch.randn(7, 6, dtype=torch.float64)
    soft = chosen(table, scores, owner, "plain", soft=True)
    reference = (scores.softmax(-1) * table[owner][:, None, :]).sum(-1)
    torch.testing.assert_close(soft, reference)
    ours = torch.autograd.grad((soft * incoming).sum(), (table, scores))
    theirs = torch.autograd.grad((reference * incoming).sum(), (table, scores))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (hard,) = torch.autograd.grad((chosen(table, scores, owner, "plain") * incoming).sum(), scores)
    torch.testing.assert_close(hard, theirs[1], rtol=0, atol=1e-12)


SPREAD = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 4.0]], dtype=torch.float64)


def spread_gradient(gradient: str, incoming: float = 1.0) -> Tensor:
    """Of a weight at the middle codeword of SPREAD, all scores alike but for the bit that decides."""
    scores = torch.zeros(1, 1, 5, dtype=torch.float64)
    scores[..., 2] = 1e-9
    scores.requires_grad_()
    out = chosen(SPREAD, scores, torch.zeros(1, dtype=torch.int64), gradient)
    (found,) = torch.autograd.grad(out.sum() * incoming, scores)
    return found.flatten()


def test_the_proximal_gradient_falls_with_distance_and_the_plain_one_rises() -> None:
    plain = spread_gradient("plain")
    assert plain[4] > plain[3] > 0
    for phi in ("inverse", "exponential"):
        ours = spread_gradient(phi)
        assert ours[3] > ours[4] > 0
        assert ours[1] < ours[0] < 0
        assert torch.equal(ours.sign(), plain.sign().where(plain.abs() > 1e-6, 0))
        up = -spread_gradient(phi, -1.0)  # the loss falls as the weight grows: the nearest above gains most
        assert int(up.argmax()) == 3
    assert spread_gradient("neighbours").tolist() == [0, -1, 0, 1, 0]


@given(st.integers(0, 2**31))
def test_phi_falls_with_distance(seed: int) -> None:
    table = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance = (table[:, None, :] - table[:, :, None]).abs()
    for phi in ("inverse", "exponential"):
        size = closeness(table, phi).abs()
        order = distance.argsort(-1)
        ordered = size.gather(-1, order)[..., 1:]  # without the codeword itself, which gets nothing
        assert bool((ordered.diff(dim=-1) <= 0).all())
        assert float(size.diagonal(dim1=1, dim2=2).abs().max()) == 0
    assert closeness(table, "neighbours").abs().sum(-1).sort().values[0].tolist() == [1, 1, 2, 2, 2, 2]


def test_one_step_goes_to_a_neighbour_and_the_plain_one_to_the_end() -> None:
    def stepped(gradient: str, lr: float) -> int:
        scores = torch.zeros(1, 1, 5, dtype=torch.float64)
        scores[..., 2] = 0.2
        scores.requires_grad_()
        out = chosen(SPREAD, scores, torch.zeros(1, dtype=torch.int64), gradient)
        (g,) = torch.autograd.grad(-out.sum(), scores)
        return int((scores - lr * g).argmax())

    assert stepped("plain", 0.5) == 4
    assert stepped("inverse", 0.5) == stepped("exponential", 5.0) == stepped("neighbours", 0.5) == 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.floats(0.01, 3.0))
def test_neighbours_only_moves_by_one(seed: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2, 6, generator=generator, dtype=torch.float64).sort(1).values
    owner = torch.tensor([0, 1, 0, 1])
    w = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    made = CodebookWeight(table, None, nearest(table, w, owner), owner, None, torch.float64)
    made.begin(w, "neighbours")
    assert made.scores is not None
    before, incoming = made.current(), torch.randn(4, 9, generator=generator, dtype=torch.float64)
    (g,) = torch.autograd.grad((made(w) * incoming).sum(), made.scores)
    step = lr * g / g.abs().max()
    ranks = made.scores.argsort(-1, descending=True)
    made.scores.data -= step
    after = made.current()
    moved = (after - before).abs()
    # where the best of the codewords that get no gradient did not pass by, a weight is at a neighbour
    own = made.scores.gather(-1, before[..., None])[..., 0]
    third = made.scores.gather(-1, ranks)[..., 1:].amax(-1)
    assert bool((moved[own >= third] == 0).all())
    assert bool((moved <= 1).all())


def test_scores_of_neighbours_and_latents_agree() -> None:
    """One step of plain descent from a weight towards the codeword on its other side flips both, or neither."""
    table = torch.arange(4.0, dtype=torch.float64)[None]
    owner = torch.zeros(1, dtype=torch.int64)
    w = torch.linspace(0.02, 2.98, 61, dtype=torch.float64)[None]
    codes = nearest(table, w, owner)
    towards = (w - codes).sign()  # the other of the two codewords that a weight lies between
    for lr in (0.05, 0.3, 0.7):
        found = []
        for form, rate in (("scores", 2 * lr), ("latent", lr)):
            made = CodebookWeight(table.clone(), None, codes, owner, None, torch.float64)
            made.begin(w, "neighbours", form)
            learned = made.scores if form == "scores" else made.latent
            assert learned is not None
            (g,) = torch.autograd.grad(-(made(w) * towards).sum(), learned)
            learned.data -= rate * g
            found.append(made.current())
        assert torch.equal(*found)
        assert bool((found[0] != codes).any())
        assert bool((found[0] == codes).any()) or lr > 0.5


def test_the_shared_adam_keeps_the_proportions_of_scores() -> None:
    p = nn.Parameter(torch.zeros(2, 3))
    optimizer = SharedAdam([{"params": [p], "shared": True}], lr=0.1, steps=10)
    p.grad = torch.tensor([[1.0, 2.0, 0.0], [100.0, -300.0, 0.0]])
    optimizer.step()
    torch.testing.assert_close(p[:, 1] / p[:, 0], torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(p.detach().square().mean(1).sqrt(), torch.full((2,), 0.1))
    plain, own = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ours, theirs = SharedAdam([own], lr=0.1, steps=10**9), torch.optim.Adam([plain], lr=0.1, eps=1e-12)
    for step in range(5):
        for q, optimizer_ in ((own, ours), (plain, theirs)):
            q.grad = torch.arange(1.0, 6.0) * (-1) ** step + step
            optimizer_.step()
    torch.testing.assert_close(own, plain)


# ------------------------------------------------------------------------------------- learning and closed forms


@pytest.mark.parametrize("mode", ["codebooks", "scales"])
@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_solved_codebooks_have_the_least_error(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module = {
        "linear": nn.Linear(12, 10), "conv": nn.Conv2d(4, 10, 3, stride=2, padding=1, groups=2),
        "transposed": nn.ConvTranspose1d(6, 4, 3),
    }[kind]  # fmt: skip
    x = {"linear": torch.randn(40, 3, 12), "conv": torch.randn(9, 4, 7, 7), "transposed": torch.randn(9, 6, 8)}[kind]
    model = nn.Sequential(layer).double()
    w = model[0].weight.detach().flatten(1)
    owner = torch.arange(len(w)) % 2
    book, scale = by_weights(w, owner, 4, mode)
    codes = nearest(book if scale is None else scale * book, w, owner)
    made = CodebookWeight(book, scale, codes, owner, None, torch.float64)
    work = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(work[0], "weight", made)
    [seen] = walk(model, ["0"], [x.double()])
    before = output_error(work[0], seen)
    by_outputs(model[0], made, seen)
    after = output_error(work[0], seen)
    assert after < before
    parameters = [made.book, *([] if made.scale is None else [made.scale])]
    call = seen.calls[0]
    loss = (work[0](*call.args) - call.output).square().sum()
    for g in torch.autograd.grad(loss, parameters):
        assert float(g.abs().max()) < 1e-3 * float(loss.detach())
    for p in parameters:
        for _ in range(5):
            kept, noise = p.detach().clone(), 0.01 * torch.randn_like(p)
            p.data += noise
            assert output_error(work[0], seen) > after
            p.data.copy_(kept)


def mlp(seed: int = 0) -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, [torch.randn(128, 6) @ torch.randn(6, 16)]


SETTINGS = [
    {"gradient": "plain"}, {"gradient": "plain", "soft": True, "sharpness": 4.0}, {"phi": "inverse"},
    {"phi": "exponential"}, {"phi": "neighbours"}, {"phi": "inverse", "soft": True}, {"form": "latent"},
    {"start": "index", "sharpness": 0.5}, {"mode": "scales"}, {"mode": "scales", "form": "latent"},
    {"balanced": True, "feature": "std"},
]  # fmt: skip


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_learning_both_is_better_than_codebooks_and_those_than_nothing(how: dict[str, Any]) -> None:
    model, data = mlp()
    shape = {key: how[key] for key in ("mode", "balanced", "feature") if key in how}

    def lost(**more: Any) -> float:
        made = learn_codebooks(model, 2, 4, **more).model
        return float((answer(made, data[0]) - answer(model, data[0])).square().mean())

    nothing = lost(**shape)
    books = lost(**shape, calibration=data, learn="codebooks")
    both = lost(calibration=data, steps=150, **how)
    assert both < books < nothing


def test_each_layer_is_kept_only_where_it_is_better() -> None:
    model, data = mlp()
    made = learn_codebooks(model, 2, 4, calibration=data, learn="codebooks").model
    wild = learn_codebooks(model, 2, 4, calibration=data, steps=3, lr=50.0, book_lr=50.0).model
    assert torch.equal(answer(made, data[0]), answer(wild, data[0]))


def test_blocks_and_a_loss() -> None:
    model, data = mlp()
    # the softmax keeps the rows of the block's last layer where they are
    model = nn.Sequential(nn.Sequential(*list(model)[:3]), nn.Softmax(1), model[4]).train()
    labels = answer(model, data[0]).argmax(1)

    def loss(out: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, labels)

    def lost(m: nn.Module) -> float:
        return float(loss(answer(m, data[0])))

    block = learn_codebooks(model, 2, 4, calibration=data, steps=100, blocks=["0"])
    assert set(block.changed) == {"0.0", "0.2", "2"}
    plain = learn_codebooks(model, 2, 4)

    def off(changes: Changes) -> float:
        made = answer(changes.model.get_submodule("0"), data[0])
        return float((made - answer(model[0], data[0])).square().mean())

    assert off(block) < off(plain) / 2
    tuned = learn_codebooks(
        model, 2, 4, calibration=data, steps=100, blocks=["0"], loss=loss, loss_steps=60, book_lr=0.05
    )
    assert lost(tuned.model) < lost(block.model)
    assert model.training
    assert block.model.training
    with pytest.raises(QuantizationError, match="holds no layer"):
        learn_codebooks(model, 2, 4, calibration=data, blocks=["1"])
    with pytest.raises(QuantizationError, match="lower book_lr"):
        learn_codebooks(model, 2, 4, calibration=data, steps=1, loss=lambda out: out.sum() * torch.nan, loss_steps=1)


def test_a_seed_decides_all() -> None:
    model, data = mlp()
    state = torch.get_rng_state()
    one, two = (learn_codebooks(model, 2, 4, calibration=data, steps=20, seed=3).model for _ in range(2))
    assert torch.equal(answer(one, data[0]), answer(two, data[0]))
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------- real shapes


def test_a_language_model_with_tied_embeddings(tmp_path: Path) -> None:
    model = llama().eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight or not model.config.tie_word_embeddings
    changes = learn_codebooks(model, {"*embed_tokens": 8, "lm_head": 8, "*": 3}, 4, calibration=[IDS], steps=3)
    assert not changes.left
    kept = {name: packing for name, _, packing in lookups(changes.model)}
    mlp_, attention = "model.layers.0.mlp", "model.layers.0.self_attn"
    for name in (f"{mlp_}.up_proj", f"{mlp_}.gate_proj", f"{attention}.v_proj"):
        assert kept[name].sizes is not None, name
    for name in (f"{mlp_}.down_proj", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.o_proj"):
        assert kept[name].owner is not None, name
    assert torch.isfinite(changes.model(IDS).logits).all()
    again = load_packed(save_packed(changes.model, tmp_path / "small"), into=llama(1))
    assert torch.equal(again(IDS).logits, changes.model(IDS).logits)
    assert size_report(changes.model).weights == sum(p.numel() for p in model.parameters() if p.dim() > 1)


def test_the_first_layers_of_a_real_language_model() -> None:
    whole = load("smollm2")
    model = whole.module().eval()
    model.model.layers = model.model.layers[:1]
    tokens = whole.tokenizer("The neuropil is the tissue in which neurons meet. " * 20)["input_ids"][:192]
    seen, fresh = torch.tensor(tokens[:128]).view(4, 32), torch.tensor(tokens[128:]).view(2, 32)
    layers = {f"model.layers.0.{name}": 2 for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.*")}
    with torch.no_grad():
        wanted = model.model(fresh).last_hidden_state

    def lost(**how: Any) -> float:
        changes = learn_codebooks(model, layers, 8, **how)
        assert len(changes.changed) == 5
        with torch.no_grad():
            return float((changes.model.model(fresh).last_hidden_state - wanted).square().mean() / wanted.var())

    assert lost(calibration=[seen], steps=10) < lost() / 1.5


def test_layers_whose_rows_are_inputs() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).eval()
    changes = learn_codebooks(model, 3, 2, calibration=[IDS], steps=5, skip=["*wte", "*wpe"])
    assert "transformer.h.0.mlp.c_fc" in changes.changed
    assert "lm_head" in changes.left
    rough = learn_codebooks(model, 3, 2, skip=["*wte", "*wpe"])
    lost = [float((c.model(IDS).logits - model(IDS).logits).detach().square().mean()) for c in (changes, rough)]
    assert lost[0] < lost[1]


def test_half_precision_and_layers_that_never_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    del model._modules["spare"]
    changes = learn_codebooks(model, 4, 2, calibration=[torch.randn(16, 8, dtype=torch.bfloat16)], steps=3)
    assert changes.model.get_submodule("0").weight.dtype == torch.bfloat16

    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    assert set(learn_codebooks(Spare(), 2, 2, calibration=[torch.randn(9, 4)], steps=2).changed) == {"used", "spare"}


def test_patterns_give_layers_their_own() -> None:
    model, _ = mlp()
    changes = learn_codebooks(model, {"0": 4, "2": 2}, {"0": 1, "*": 3})
    assert changes.left == {"4": "no pattern names it"}
    kept = {name: packing for name, _, packing in lookups(changes.model)}
    assert kept["0"].table.shape == (1, 1, 16, 1)
    assert kept["2"].table.shape[2] == 4


def test_layers_with_few_weights_get_smaller_codebooks() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    changes = learn_codebooks(model, 8, 1, dtype=torch.float32)
    x = torch.randn(5, 2)
    torch.testing.assert_close(answer(changes.model, x), answer(model, x))
    kept = {name: packing.table.shape[2] for name, _, packing in lookups(changes.model)}
    assert kept == {"0": 6, "2": 3}
    model[0].weight.data.fill_(0.25)
    constant = learn_codebooks(model, 2, 1).model
    assert torch.equal(constant.get_submodule("0").weight, torch.full((3, 2), 0.25))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"bits": 0}, "bits=0"),
    ({"bits": 9}, "bits=9"),
    ({"groups": 0}, "groups=0"),
    ({"groups": 5}, r"4: groups=5 for 4 rows"),
    ({"mode": "books"}, "mode="),
    ({"gradient": "steep"}, "gradient="),
    ({"phi": "linear"}, "phi="),
    ({"form": "real"}, "form="),
    ({"learn": "scores"}, "learn="),
    ({"start": "zero"}, "start="),
    ({"feature": "mean"}, "feature="),
    ({"gradient": "plain", "form": "latent"}, "proximal by nature"),
    ({"bits": {"none": 2}}, "no layer"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(w) for w, _ in WRONG])
def test_settings_that_make_no_sense(wrong: dict[str, Any], message: str) -> None:
    model, _ = mlp()
    with pytest.raises(QuantizationError, match=message) as caught:
        learn_codebooks(model, **{"groups": 2, **wrong})
    assert isinstance(caught.value, ValueError)


def test_models_that_cannot_be_compressed() -> None:
    model, _ = mlp()
    small = learn_codebooks(model, 2, 2).model
    with pytest.raises(ValueError, match="compressed already"):
        learn_codebooks(small, 2, 2)
    with pytest.raises(ReconstructionError, match="empty"):
        learn_codebooks(model, 2, 2, calibration=[])
    with pytest.raises(ValueError, match="no layer of the model is packed"):
        size_report(model)
    huge = copy.deepcopy(model)
    huge[0].weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="too large"):
        learn_codebooks(huge, 2, 2)
    huge[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0\.weight holds NaN"):
        learn_codebooks(huge, 2, 2)
