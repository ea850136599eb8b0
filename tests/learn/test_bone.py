"""Bone: the sheet's invariants on random weights, peft as oracle and partner, and the models that need care."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import llama
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from neuropil.changes import Changes
from neuropil.errors import ModelError
from neuropil.learn.bone import (
    VARIANTS,
    BoneBlock,
    BoneLinear,
    add_bone,
    disable_bone,
    merge_bone,
    remove_bone,
    unmerge_bone,
    use_bone,
)
from neuropil.learn.bone_files import load_bone, save_bone
from neuropil.models import load

IDS = torch.arange(24).view(2, 12)


def specimen(seed: int = 0) -> tuple[nn.Module, Callable[[nn.Module], Changes], tuple[Tensor, ...]]:
    """A model with a layer of each sort, the transform, and its input."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3), nn.Conv1d(5, 2, 1))
    return model, lambda m: add_bone(m, r=4, where=lambda name, _: name != "3"), (torch.arange(10).view(2, 5),)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(out: int, n: int, r: int, variant: str, scale: float = 0.1, seed: int = 7) -> BoneBlock:
    """A block of random numbers in float64."""
    made = BoneBlock(out, n, r, variant, mini_r=out // 2 if variant == "mini" else None, dtype=torch.float64)
    made.block.data = scale * draw(seed, *made.block.shape)
    return made


def add(host: BoneLinear, made: BoneBlock) -> None:
    host.blocks["a"] = made
    host.use("a")


def adapted(variant: str, scale: float = 0.1, **kwargs: Any) -> tuple[nn.Sequential, Tensor]:
    """Two layers (12 x 8 and 8 x 12) with random blocks, in float64, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    add_bone(model, r=4, variant=variant, mini_r=2 if variant == "mini" else None, **kwargs)
    fill(model, scale)
    return model, draw(3, 5, 8)


def fill(model: nn.Module, scale: float = 0.1, seed: int = 7) -> None:
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.data = (scale * draw(seed + i, *p.shape)).to(p.dtype)


# --- the equations -----------------------------------------------------------------------------------


def by_hand(weight: Tensor, blocks: Tensor, variant: str, r: int) -> Tensor:
    """The sheet's formula, a tile at a time."""
    out = weight.clone()
    for a in range(weight.shape[0] // r):
        for b in range(weight.shape[1] // r):
            here = slice(a * r, (a + 1) * r), slice(b * r, (b + 1) * r)
            tile = weight[here]
            if variant == "ab":
                out[here] += tile @ blocks[0][a] + blocks[1][a]
            else:
                own = {"col": lambda a=a: blocks[a], "row": lambda b=b: blocks[b], "free": lambda: blocks}[variant]()
                out[here] += tile @ own + own
    return out


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["col", "row", "free", "ab"]))
@settings(max_examples=30, deadline=None)
def test_tiles_change_as_the_formula_says(rows: int, columns: int, r: int, variant: str) -> None:
    weight, made = draw(0, rows * r, columns * r), block(rows * r, columns * r, r, variant)
    torch.testing.assert_close(made.change(weight), by_hand(weight, made.block, variant, r), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [8, 10])
def test_shards_are_the_matrix_form(n: int) -> None:
    """dW[:, j] = D[j mod r], also where r does not divide the inputs; mini repeats along the outputs."""
    weight, x = draw(0, 12, n), draw(1, 5, n)
    for variant in ("miss", "mini"):
        made = block(12, n, 4, variant)
        D = made.block.repeat(1, 12 // made.block.shape[1])
        delta = torch.stack([D[j % 4] for j in range(n)], dim=1)
        torch.testing.assert_close(made.change(weight), weight + delta, rtol=0, atol=1e-12)
        torch.testing.assert_close(made.around(lambda v: v @ weight.T, x), x @ (weight + delta).T)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_layer_multiplies_by_the_changed_weight(variant: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 12).double()
    host = BoneLinear(copy.deepcopy(base))
    add(host, block(12, 8, 4, variant))
    x = draw(1, 2, 3, 8)
    expected = x @ host.blocks["a"].change(base.weight).T + base.bias
    torch.testing.assert_close(host(x), expected)
    torch.testing.assert_close(x @ host.weight.T + host.bias, expected)
    assert not torch.allclose(base(x), expected, atol=1e-2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_changes_nothing(variant: str) -> None:
    net = llama()
    before = net(IDS).logits
    add_bone(net, r=8, variant=variant, mini_r=4 if variant == "mini" else None)
    assert torch.equal(net(IDS).logits, before)


def test_numbers_of_parameters() -> None:
    out, n, r = 12, 8, 4
    count = {v: sum(p.numel() for p in block(out, n, r, v).parameters()) for v in VARIANTS}
    assert count == {"col": out * r, "row": n * r, "free": r * r, "ab": 2 * out * r, "miss": r * out, "mini": r * 6}


@pytest.mark.parametrize("variant", ["col", "row", "free"])
def test_each_tile_is_mapped_affinely_and_adapters_compose(variant: str) -> None:
    """(W' + I) = (W + I)(I + B) a tile, so (I + B1)(I + B2) - I is one block for two."""
    weight, eye = draw(0, 12, 8), torch.eye(4, dtype=torch.float64)
    one, two, both = (block(12, 8, 4, variant, seed=s) for s in (1, 2, 3))
    shifted = one.change(weight)[4:8, :4] + eye
    own = one.block[1] if variant == "col" else one.block[0] if variant == "row" else one.block
    torch.testing.assert_close(shifted, (weight[4:8, :4] + eye) @ (eye + own))
    both.block.data = one.block + two.block + one.block @ two.block
    torch.testing.assert_close(both.change(weight), two.change(one.change(weight)))


def test_the_gradient_at_zero_is_guided_by_the_weight() -> None:
    """dL/dB[a] = sum over b of (W(a,b)^T + I) G(a,b); for MiSS dL/dD = S(x)^T G_y."""
    torch.manual_seed(0)
    base = nn.Linear(8, 12, bias=False).double()
    x, target = draw(1, 6, 8), draw(2, 6, 12)
    grads = {}
    for variant in ("col", "miss"):
        host = BoneLinear(copy.deepcopy(base))
        add(host, block(12, 8, 4, variant, scale=0.0))
        (host(x) - target).square().sum().backward()
        grads[variant] = host.blocks["a"].block.grad
    G_y = 2 * (base(x) - target).detach()
    G, W, eye = G_y.T @ x, base.weight.detach(), torch.eye(4, dtype=torch.float64)
    for a in range(3):
        tiles = [(slice(4 * a, 4 * a + 4), slice(4 * b, 4 * b + 4)) for b in range(2)]
        expected = sum((W[t].T + eye) @ G[t] for t in tiles)
        torch.testing.assert_close(grads["col"][a], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(grads["miss"], (x[:, :4] + x[:, 4:]).T @ G_y)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_changed_weight(variant: str) -> None:
    """Whichever way the answer is computed, input and block get the gradients of x W'^T."""
    made, weight, x = block(12, 8, 4, variant), draw(0, 12, 8), draw(1, 3, 8).requires_grad_()
    host = BoneLinear(nn.Linear(8, 12, bias=False).double())
    host.base.weight.data = weight
    add(host, made)
    plain = torch.autograd.grad((x @ made.change(weight).T).sin().sum(), [x, made.block])
    for g, e in zip(torch.autograd.grad(host(x).sin().sum(), [x, made.block]), plain, strict=True):
        torch.testing.assert_close(g, e)
    assert torch.autograd.gradcheck(host, (x,))


def test_blocks_of_one_and_of_the_whole_matrix() -> None:
    weight, beta = draw(0, 5, 3), block(5, 3, 1, "col")
    rows = beta.block.view(5, 1)
    torch.testing.assert_close(beta.change(weight), weight + rows * (weight + 1))
    weight, target, whole = draw(0, 6, 6), draw(1, 6, 6), block(6, 6, 6, "col")
    whole.block.data = torch.linalg.solve(weight + torch.eye(6).double(), target - weight)[None]
    torch.testing.assert_close(whole.change(weight), target)


def test_the_weight_guide_gives_an_update_of_full_rank() -> None:
    weight = draw(0, 24, 24)
    rank = {
        v: int(torch.linalg.matrix_rank((block(24, 24, 4, v).change(weight) - weight).detach()))
        for v in ("col", "miss")
    }
    assert rank == {"col": 24, "miss": 4}
    delta = (block(24, 24, 4, "miss").change(weight) - weight).detach()
    torch.testing.assert_close(delta[:, :4], delta[:, 8:12])


def test_mini_over_all_outputs_is_miss() -> None:
    weight, miss = draw(0, 12, 10), block(12, 10, 4, "miss")
    mini = BoneBlock(12, 10, 4, "mini", mini_r=12, dtype=torch.float64)
    mini.block.data = miss.block.data
    torch.testing.assert_close(mini.change(weight), miss.change(weight))


# --- merging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_keeps_the_answers_and_unmerging_gives_the_weights_back(variant: str) -> None:
    model, x = adapted(variant)
    before, weight = model(x), model[0].base.weight.clone()
    merge_bone(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-10)
    assert not torch.allclose(model[0].base.weight, weight, atol=1e-3)
    unmerge_bone(model)
    torch.testing.assert_close(model[0].base.weight, weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-9)
    now = model[0].base.weight.clone()
    merge_bone(model, keep=True)
    assert not torch.equal(model[0].base.weight, now)
    unmerge_bone(model)
    assert torch.equal(model[0].base.weight, now)
    merge_bone(model)
    plain = remove_bone(model)
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), before, rtol=0, atol=1e-9)


def test_a_singular_block_cannot_be_unmerged_unless_kept() -> None:
    model, _ = adapted("col")
    model[2].blocks["default"].block.data[1] = -torch.eye(4)
    weights = [model[i].base.weight.clone() for i in (0, 2)]
    merge_bone(model)
    merged = [model[i].base.weight.clone() for i in (0, 2)]
    with pytest.raises(ValueError, match=r"'2' cannot be unmerged.*inf"):
        unmerge_bone(model)
    assert all(torch.equal(model[i].base.weight, w) for i, w in zip((0, 2), merged, strict=True))
    model[0].base.weight, model[2].base.weight = (nn.Parameter(w) for w in weights)
    for host in (model[0], model[2]):
        host.merges.clear()
    merge_bone(model, keep=True)
    unmerge_bone(model)
    assert all(torch.equal(model[i].base.weight, w) for i, w in zip((0, 2), weights, strict=True))


def test_a_weight_that_is_not_finite_is_not_merged() -> None:
    model, _ = adapted("col")
    model[2].blocks["default"].block.data[0, 0, 0] = float("nan")
    before = model[0].base.weight.clone()
    with pytest.raises(ValueError, match="'2' is not finite"):
        merge_bone(model)
    assert torch.equal(model[0].base.weight, before)
    assert not model[0].merges


def test_several_adapters_by_name_and_merged_in_turn() -> None:
    model, x = adapted("col")
    base = nn.Sequential(copy.deepcopy(model[0].base), nn.Tanh(), copy.deepcopy(model[2].base))
    first = model(x)
    changes = add_bone(model, r=2, variant="row", name="second", where=lambda name, _: name == "0")
    assert changes.changed == ("0",)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.blocks.second.block"}
    use_bone(model, "second")
    torch.testing.assert_close(model(x), base(x))
    use_bone(model, "default")
    assert torch.equal(model(x), first)
    with disable_bone(model):
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), first)
    use_bone(model, None)
    assert torch.equal(model(x), base(x))
    use_bone(model, "default")
    merge_bone(model)
    use_bone(model, "second")
    model[0].blocks["second"].block.data += 0.1
    both = model(x)
    assert not torch.allclose(both, first, atol=1e-2)
    merge_bone(model)
    torch.testing.assert_close(model(x), both)
    unmerge_bone(model)
    unmerge_bone(model)
    torch.testing.assert_close(model[0].base.weight, base[0].weight)
    with pytest.raises(ValueError, match="no adapter 'third'; there are default, second"):
        use_bone(model, "third")
    with pytest.raises(ValueError, match="none is merged"):
        unmerge_bone(model)


def test_the_adapter_merged_last_is_unmerged_whatever_layers_it_has() -> None:
    model, x = adapted("col", where=lambda name, _: name == "0")
    first, weight = model(x), model[0].base.weight.clone()
    merge_bone(model)
    add_bone(model, r=4, name="second")  # in the first layer on top of the other, in the last alone
    fill(model, seed=20)
    assert not torch.allclose(model(x), first, atol=1e-2)
    merge_bone(model)
    unmerge_bone(model)
    use_bone(model, None)
    torch.testing.assert_close(model(x), first)
    use_bone(model, "second")
    merge_bone(model)
    for _ in range(2):
        unmerge_bone(model)
    torch.testing.assert_close(model[0].base.weight, weight)
    torch.testing.assert_close(model(x), first)


def test_one_adapter_in_two_calls_and_the_newest_alone_acts() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    x, blocks = draw(3, 5, 8), ["0.blocks.default.block", "2.blocks.default.block"]
    base = model(x)
    add_bone(model, r=4, where=lambda name, _: name == "0")
    add_bone(model, r=2, where=lambda name, _: name == "2")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == blocks
    fill(model)
    add_bone(model, r=2, name="new", where=lambda name, _: name == "2")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.blocks.new.block"]
    torch.testing.assert_close(model(x), base)


def test_kept_weights_follow_a_model_that_was_moved() -> None:
    model, _ = adapted("col")
    weight = model[0].base.weight.clone()
    merge_bone(model, keep=True)
    model.float()
    unmerge_bone(model)
    assert torch.equal(model[0].base.weight, weight.float())


# --- models that need care -----------------------------------------------------------------------------


def test_everything_else_is_frozen_and_the_head_is_left() -> None:
    net = llama(tied=True)
    changes = add_bone(net, r=8)
    assert changes.model is net
    assert len(changes.changed) == 14
    assert set(changes.left) == {"model.embed_tokens", "lm_head"}
    assert all(p.requires_grad == ("blocks" in n) for n, p in net.named_parameters())


def test_a_tied_head_is_merged_apart_from_its_embedding_and_tied_again() -> None:
    net = llama(tied=True)
    add_bone(net, r=8, where=lambda name, _: name == "lm_head")
    fill(net)
    tuned, embedding = net(IDS).logits, net.model.embed_tokens.weight.clone()
    merge_bone(net)
    torch.testing.assert_close(net(IDS).logits, tuned)
    assert torch.equal(net.model.embed_tokens.weight, embedding)
    unmerge_bone(net)
    assert net.lm_head.base.weight is net.model.embed_tokens.weight


def test_a_layer_used_in_two_places_is_adapted_in_both() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert add_bone(model, r=4).changed == ("a", "b.0")
    assert isinstance(model["a"], BoneLinear)
    assert model["a"] is model["b"][0]
    assert remove_bone(model)["b"][0] is layer
    assert model["a"] is layer


def test_conv1d_of_gpt2() -> None:
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16)).eval()
    for variant in ("col", "row", "miss"):
        net2 = copy.deepcopy(net)
        before, weight = net2(IDS).logits, net2.transformer.h[0].mlp.c_fc.weight.clone()
        assert len(add_bone(net2, r=8, variant=variant).changed) == 4
        assert torch.equal(net2(IDS).logits, before)
        fill(net2)
        host = net2.transformer.h[0].mlp.c_fc
        x = torch.randn(3, 32)
        torch.testing.assert_close(
            host(x), x @ host.blocks["default"].change(weight.T).T + host.bias, rtol=1e-4, atol=1e-5
        )
        tuned = net2(IDS).logits
        assert not torch.allclose(tuned, before, atol=1e-2)
        merge_bone(net2)
        torch.testing.assert_close(net2(IDS).logits, tuned, rtol=1e-4, atol=1e-4)
        unmerge_bone(net2)
        torch.testing.assert_close(net2.transformer.h[0].mlp.c_fc.base.weight, weight, rtol=0, atol=1e-5)


def test_attention_that_reads_the_weight_of_its_output_projection() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    changes = add_bone(model, r=4)
    assert changes.changed == ("self_attn.out_proj", "linear1", "linear2")
    assert "packed" in changes.left["self_attn"]
    x = torch.randn(2, 5, 16)
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            before = model(x)
        model.self_attn.out_proj.blocks["default"].block.data += 0.2
        with torch.no_grad():
            assert not torch.allclose(model(x), before, atol=1e-3)
    model(x).sum().backward()
    assert model.self_attn.out_proj.blocks["default"].block.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_weights_get_float32_blocks(variant: str) -> None:
    net = llama().bfloat16()
    before = net(IDS).logits
    add_bone(net, r=8, variant=variant, mini_r=4 if variant == "mini" else None)
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(net(IDS).logits, before)
    fill(net, 0.02)
    tuned = net(IDS).logits
    assert tuned.dtype == torch.bfloat16
    merge_bone(net)
    torch.testing.assert_close(net(IDS).logits, tuned, rtol=0.05, atol=0.05)


def test_recomputing_and_gradient_checkpointing_give_the_same_gradients() -> None:
    grads = []
    for recompute, layerwise in ((False, False), (True, False), (False, True)):
        net = llama().train()
        add_bone(net, r=8, recompute=recompute)
        fill(net)
        if layerwise:
            net.activation_checkpointing_enable()
        net(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in net.parameters() if p.requires_grad])
    for other in grads[1:]:
        for g, e in zip(grads[0], other, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-7)
            assert g.abs().sum() > 0


@pytest.mark.parametrize("variant", ["col", "row", "miss"])
def test_a_quantised_weight_is_dequantised_for_the_adapter_alone(variant: str) -> None:
    ao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    dense = model[0].weight.detach().clone()
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    kind, rounded = type(model[0].weight), model[0].weight.dequantize()
    assert 0 < (rounded - dense).abs().max() < 0.01
    x = torch.randn(3, 32)
    before = model(x)
    add_bone(model, r=16, variant=variant)
    torch.testing.assert_close(model(x), before)
    fill(model)
    expected = x @ model[0].blocks["default"].change(rounded).T
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert model[0].blocks["default"].block.grad.abs().sum() > 0
    merge_bone(model)
    assert type(model[0].base.weight) is nn.Parameter
    torch.testing.assert_close(model(x), expected)
    unmerge_bone(model)
    assert type(model[0].base.weight) is kind
    with disable_bone(model):
        assert torch.equal(model(x), before)


class Doubling(nn.Linear):
    """A linear layer whose weight is not all of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_is_more_than_its_weight() -> None:
    model = nn.Sequential(Doubling(8, 8))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(TypeError, match="Doubling holds no plain weight"):
        add_bone(model, r=4)
    assert type(model[0]) is Doubling
    assert model[0].weight.requires_grad
    add_bone(model, r=4, variant="row")
    torch.testing.assert_close(model(x), before)
    with pytest.raises(TypeError, match="Doubling"):
        merge_bone(model)
    weight_norm = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(TypeError, match="parametrization"):
        add_bone(weight_norm, r=4)


def test_one_linear_layer_is_a_model_too() -> None:
    layer = nn.Linear(8, 12)
    changes = add_bone(layer, r=4)
    assert isinstance(changes.model, BoneLinear)
    assert remove_bone(changes.model) is layer


def test_dropout_acts_in_training_alone() -> None:
    model, x = adapted("miss", dropout=0.5)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_compiled_it_answers_alike() -> None:
    jaxtyping.config.update("jaxtyping_disable", True)  # dynamo cannot trace the checks of the signatures
    try:
        for variant in VARIANTS:
            torch._dynamo.reset()
            model, x = adapted(variant)
            torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


# --- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "r is 0; expected 1 or more"),
        ({"r": 5}, r"0: a weight of 12 x 8 is not divisible into blocks of 5 x 5; expected r among 1, 2, 4 "),
        ({"r": 4, "variant": "diagonal"}, "expected one of col, row, free, ab, miss, mini"),
        ({"r": 9, "variant": "miss"}, "at most the 8 inputs"),
        ({"r": 4, "variant": "mini"}, "'mini' needs it"),
        ({"r": 4, "variant": "mini", "mini_r": 5}, "divisor of the 12 outputs"),
        ({"r": 4, "dropout": 0.1}, "dropout=0.1 with variant 'col'"),
        ({"r": 4, "name": "a.b"}, "without dots"),
        ({"r": 4, "name": "keys"}, "reserves"),
        ({"r": 4, "where": lambda *_: False}, "no linear layer to adapt"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changed(kwargs: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(3, 3, 1))
    with pytest.raises(ValueError, match=message):
        add_bone(model, **kwargs)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_layers_of_other_kinds_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Conv1d(3, 3, 1))
    with pytest.raises(TypeError, match="Conv1d is no linear layer"):
        add_bone(model, r=4, where=lambda _, m: isinstance(m, nn.Conv1d))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Linear"):
        BoneLinear(nn.Conv1d(3, 3, 1))
    for act in (merge_bone, unmerge_bone, remove_bone, lambda m: use_bone(m, None)):
        with pytest.raises(ValueError, match="add_bone"):
            act(model)
    add_bone(model, r=4)
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        add_bone(model, r=4)
    merge_bone(model)
    with pytest.raises(ValueError, match="unmerge_bone"), disable_bone(model):
        pass
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_bone(model)


# --- peft ----------------------------------------------------------------------------------------------

IN_PEFT = {"col": "bat", "miss": True, "mini": "mini"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def in_peft(net: nn.Module, variant: str, r: int = 4, **kwargs: Any) -> PeftModel:
    mini = {"mini_r": 8} if variant == "mini" else {}
    made = get_peft_model(net, MissConfig(r=r, init_weights=IN_PEFT[variant], target_modules=TARGETS, **mini, **kwargs))
    fill(made)
    return made


@pytest.mark.parametrize("variant", IN_PEFT)
def test_peft_loads_what_we_trained(variant: str, tmp_path: Path) -> None:
    net = llama()
    add_bone(net, r=4, variant=variant, mini_r=8 if variant == "mini" else None)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    net(IDS, labels=IDS).loss.backward()
    optimizer.step()
    ours = net(IDS).logits
    save_bone(net, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(llama()(IDS).logits, ours, atol=1e-2)
    assert sum("miss_block" in n for n, _ in theirs.named_parameters()) == 14
    merged = theirs.merge_and_unload()
    merge_bone(net)
    for name, p in remove_bone(net).named_parameters():
        torch.testing.assert_close(p, merged.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", IN_PEFT)
def test_we_load_what_peft_trained(variant: str, tmp_path: Path) -> None:
    theirs = in_peft(llama(), variant)
    theirs.save_pretrained(tmp_path)
    net = llama()
    changes = load_bone(net, tmp_path)
    assert len(changes.changed) == 14
    torch.testing.assert_close(net(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    save_bone(net, tmp_path / "again")
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_dropout_of_peft_acts_where_it_does_in_peft(tmp_path: Path) -> None:
    """Its Bat has the setting and no use for it."""
    for variant, expected in (("miss", 0.25), ("col", 0.0)):
        theirs = in_peft(llama(), variant, miss_dropout=0.25).train()
        theirs.save_pretrained(tmp_path / variant)
        assert torch.equal(theirs(IDS).logits, theirs(IDS).logits) == (variant == "col")
        net = llama()
        load_bone(net, tmp_path / variant)
        assert {m.dropout for m in net.modules() if isinstance(m, BoneBlock)} == {expected}


@pytest.mark.parametrize("variant", ["miss", "mini"])
def test_shards_that_do_not_divide_the_inputs_are_as_in_peft(variant: str, tmp_path: Path) -> None:
    """Padding in both, and the same weights when merged."""
    theirs = in_peft(llama(), variant, r=5)
    theirs.save_pretrained(tmp_path)
    net = llama()
    load_bone(net, tmp_path)
    torch.testing.assert_close(net(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    merge_bone(net)
    merged = theirs.merge_and_unload()
    for name, p in remove_bone(net).named_parameters():
        torch.testing.assert_close(p, merged.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_peft_adapts_exactly_the_layers_that_were_adapted(tmp_path: Path) -> None:
    """Names that are the endings of other names are not mistaken for them."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))

    ours = model()
    add_bone(ours, r=4, where=lambda name, _: name == "0")
    fill(ours)
    save_bone(ours, tmp_path)
    theirs = PeftModel.from_pretrained(model(), tmp_path)
    assert [n for n, _ in theirs.named_parameters() if "miss_block" in n] == ["base_model.model.0.miss_block.default"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(theirs(x), ours(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_round_trip(variant: str, tmp_path: Path) -> None:
    net = llama()
    add_bone(net, r=4, variant=variant, mini_r=8 if variant == "mini" else None, name="mine")
    fill(net)
    save_bone(net, tmp_path, "mine")
    other = llama()
    load_bone(other, tmp_path, "theirs")
    assert torch.equal(other(IDS).logits, net(IDS).logits)
    if variant not in IN_PEFT:
        with pytest.raises((ValueError, KeyError, TypeError)):
            PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(("initial", "variant"), [(True, "miss"), ("bat", "col")])
def test_adapters_of_the_former_bone_of_peft_are_read(initial: bool | str, variant: str, tmp_path: Path) -> None:
    net = llama()
    add_bone(net, r=4, variant=variant)
    fill(net)
    save_bone(net, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {k.replace("miss_block", "bone_block"): v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "BONE", "r": 4, "init_weights": initial, "bias": "none", "modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    other = llama()
    load_bone(other, tmp_path)
    assert torch.equal(other(IDS).logits, net(IDS).logits)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no adapter"):
        load_bone(llama(), tmp_path)
    in_peft(llama(), "col").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    small = nn.ModuleDict({"x": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="has no layer"):
        load_bone(small, tmp_path)
    wide = llama()
    wide.model.layers[1].mlp.up_proj = nn.Linear(32, 96)
    with pytest.raises(ValueError, match="of another model"):
        load_bone(wide, tmp_path)
    assert not any(isinstance(m, BoneLinear) for m in wide.modules())
    for change, message in (
        ({"peft_type": "LORA"}, "type 'LORA'"),
        ({"bias": "all"}, "biases"),
        ({"init_weights": "odd"}, "which variant"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match=message):
            load_bone(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="blocks"):
        load_bone(llama(), tmp_path)


def test_adapters_that_one_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    net = llama()
    with pytest.raises(ValueError, match="no Bone adapter"):
        save_bone(net, tmp_path)
    add_bone(net, r=4, where=lambda name, _: "mlp" in name)
    add_bone(net, r=8, where=lambda name, _: "self_attn" in name)
    with pytest.raises(ValueError, match="different settings"):
        save_bone(net, tmp_path)
    with pytest.raises(ValueError, match="no name"):
        save_bone(add_bone(nn.Linear(4, 4), r=4).model, tmp_path)


# --- the real model ------------------------------------------------------------------------------------


def test_smollm2_learns_a_sentence_and_forgets_it_again() -> None:
    model = load("smollm2")
    net = copy.deepcopy(model.module())
    ids = torch.tensor([model.tokenizer("Neuropil is the tissue in which neurons meet.")["input_ids"]])
    with torch.no_grad():
        before = net(ids).logits
    changes = add_bone(net, r=64, where=lambda name, _: "layers.29." in name)
    assert len(changes.changed) == 7
    trained = [p for p in net.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 64 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(4):
        loss = net(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        tuned = net(ids).logits
        merge_bone(net, keep=True)
        torch.testing.assert_close(net(ids).logits, tuned, rtol=1e-3, atol=1e-2)
        unmerge_bone(net)
        with disable_bone(net):
            assert torch.equal(net(ids).logits, before)
