"""DIMAP: the sheet's invariants on planted weights, its modules on real architectures, masks through training."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from neuropil.changes import Changes
from neuropil.compress import (
    bake_masks,
    count_operations,
    dimap_masks,
    dimap_neuron_scores,
    dimap_prune,
    dimap_prune_neurons,
    dimap_scores,
    hold_masks,
    pack_sparse,
    prune_magnitude,
)
from neuropil.compress._dimap_modules import ModulesError, energy_shares, find_weights, in_resnet, in_transformer, pools
from neuropil.errors import ModelError
from neuropil.models import load_packed, save_packed
from neuropil.neurons import find_sites
from neuropil.packed import is_packed


def swin(seed: int = 0, **changed: Any) -> Any:
    torch.manual_seed(seed)
    size = {"image_size": 32, "patch_size": 4, "num_channels": 1, "embed_dim": 16, "depths": [1, 2], "num_labels": 3}
    config = transformers.SwinConfig(**size | {"num_heads": [2, 4], "window_size": 4} | changed)
    return transformers.SwinForImageClassification(config).eval()


def vit(kind: str = "ViT") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def resnet() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
    return transformers.ResNetForImageClassification(config).eval()


class Logits(nn.Module):
    """A classifier of transformers whose answer is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def specimen(seed: int = 0) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
    """A tiny Swin, half of it pruned, and two images."""
    generator = torch.Generator().manual_seed(7)
    return Logits(swin(seed)), lambda model: dimap_prune(model, 0.5), (torch.randn(2, 1, 32, 32, generator=generator),)


def perceptron(*sizes: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def flat(masks: dict[str, Tensor]) -> Tensor:
    return torch.cat([mask.flatten() for mask in masks.values()])


def lamp(weight: Tensor) -> Tensor:
    """The reference, one weight at a time: its square over the sum of those at least as large."""
    values = sorted(((float(w) ** 2, -i) for i, w in enumerate(weight.detach().flatten().double())), reverse=True)
    scores, total = [0.0] * len(values), 0.0
    for square, minus in values:
        total += square
        scores[-minus] = square / total
    return torch.tensor(scores, dtype=torch.float64).reshape(weight.shape)


# --- scores ------------------------------------------------------------------------------------------


def test_closed_form() -> None:
    [scores] = energy_shares([torch.tensor([3.0, 2.0, 1.0])])
    assert scores.tolist() == pytest.approx([1, 4 / 13, 1 / 14], abs=1e-15)
    first, second = energy_shares([torch.tensor([-1.0, 3.0]), torch.tensor([0.0, 2.0])])  # one pool of two tensors
    assert torch.cat([first, second]).tolist() == pytest.approx([1 / 14, 1, 0, 4 / 13], abs=1e-15)


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=40, deadline=None)
def test_shares_of_any_weights(seed: int, tied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, generator=generator) for n in (7, 30, 1)]
    weights = [w.round() for w in weights] if tied else weights
    scores, sizes = torch.cat(energy_shares(weights)), torch.cat(weights).abs()
    assert torch.equal(scores == 0, sizes == 0)
    if not bool(sizes.any()):
        return
    assert float(scores.max()) == float(scores[sizes.argmax()]) == 1
    order = scores.argsort(descending=True)
    assert torch.equal(sizes[order], sizes.sort(descending=True).values), "the order is not that of magnitude"
    kept = 11  # removing all but 11: the shares telescope to the energy that is left
    energy = sizes.double().square()[order]
    left = torch.prod(1 - scores[order][kept:])
    assert float(left) == pytest.approx(float(energy[:kept].sum() / energy.sum()), abs=1e-9)


def test_extreme_weights_keep_their_order() -> None:
    [scores] = energy_shares([torch.tensor([1e-30, 3e-30, 2e-30])])
    assert scores.tolist() == pytest.approx([1 / 14, 1, 4 / 13], rel=1e-6)
    [scores] = energy_shares([torch.tensor([1e30, 3e30, 2e30])])
    assert scores.tolist() == pytest.approx([1 / 14, 1, 4 / 13], rel=1e-6)
    [scores] = energy_shares([torch.zeros(4)])
    assert scores.tolist() == [0, 0, 0, 0]
    [scores] = energy_shares([torch.full((3,), 0.3)])  # of equal weights the later goes first
    assert scores.tolist() == pytest.approx([1, 1 / 2, 1 / 3])


def test_a_layer_as_module_is_lamp() -> None:
    model = perceptron(9, 20, 14, 5)
    scores = dimap_scores(model, granularity="layer")
    assert list(scores) == ["0.weight", "1.weight", "2.weight"]
    for name, score in scores.items():
        assert torch.allclose(score, lamp(model.get_parameter(name)), atol=1e-9)


def test_lamp_of_torch_pruning_agrees_up_to_its_scale() -> None:
    """The library's LAMP is of groups of channels; with one input a channel is a weight."""
    tp = pytest.importorskip("torch_pruning")
    model = nn.Sequential(nn.Linear(1, 12, bias=False), nn.Linear(12, 3, bias=False))
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 1))
    group = graph.get_pruning_group(model[0], tp.prune_linear_out_channels, list(range(12)))
    only = tp.importance.LAMPImportance(p=2, group_reduction="first")
    theirs = only(group).double()
    ours = dimap_scores(model, granularity="layer")["0.weight"].flatten()
    assert torch.equal(theirs.argsort(), ours.argsort())
    assert torch.allclose(theirs / theirs.max(), ours, atol=1e-5)


# --- masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.29, 0.5, 0.9, 0.99])
def test_exactly_so_many_go(ratio: float) -> None:
    model = perceptron(10, 10)  # 0.29 * 100 is less than 29 in binary
    for pruned in (model, nn.Sequential(nn.Linear(10, 10)).requires_grad_(False)):
        masks = dimap_masks(pruned, ratio, granularity="layer")
        assert int((~flat(masks)).sum()) == round(ratio * 100)
    nn.init.constant_(model[0].weight, 0.5)
    mask = dimap_masks(model, ratio, granularity="layer")["0.weight"].flatten()
    assert not bool((~mask).cummax(0).values.logical_and(mask).any()), "of equal weights the first stay"


def test_ties_between_modules_go_by_index() -> None:
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False))
    for layer in model:
        nn.init.constant_(layer.weight, 1.0)
    masks = dimap_masks(model, 0.5, granularity="layer")  # scores 1, 1/2, 1/3 in each
    assert flat(masks).tolist() == [True, True, False, True, False, False] or flat(masks).sum() == 3
    assert flat(masks).tolist() == [True, True, False, True, False, False]


def test_one_module_is_global_magnitude() -> None:
    model = swin()
    masks = dimap_masks(model, 0.7, modules={".*": "all"})
    pool = torch.cat([model.get_parameter(name).detach().abs().flatten() for name in masks])
    expected = torch.zeros(len(pool), dtype=torch.bool)
    expected[pool.topk(len(pool) - math.floor(0.7 * len(pool))).indices] = True
    assert torch.equal(flat(masks), expected)
    magnitude = prune_magnitude(model, 0.7).model  # torch rounds its count to the nearest
    theirs = torch.cat([(magnitude.get_parameter(name) != 0).flatten() for name in masks])
    assert int((theirs != expected).sum()) <= 1


def test_the_scale_of_a_module_does_not_matter() -> None:
    model = swin()
    masks, magnitude = dimap_masks(model, 0.6), prune_magnitude(model, 0.6).model
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for name in pools(list(masks), "auto", "kind")["mlp"]:
            scaled.get_parameter(name).mul_(-5.3)
    again = dimap_masks(scaled, 0.6)
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    name = "swin.encoder.layers.0.blocks.0.mlp.fc1.weight"
    other = prune_magnitude(scaled, 0.6).model.get_parameter(name)
    assert int((other != 0).sum()) > 1.5 * int((magnitude.get_parameter(name) != 0).sum())


@pytest.mark.parametrize("granularity", ["kind", "stage", "block", "layer"])
def test_no_module_is_emptied(granularity: str) -> None:
    model = swin()
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            weight.mul_(10.0 ** -(number % 5))
    names = list(find_weights(model, ())[0])
    modules = pools(names, "auto", granularity)
    total = sum(model.get_parameter(name).numel() for name in names)
    masks = dimap_masks(model, 1 - len(modules) / total, granularity=granularity)
    for members in modules.values():
        assert int(flat({name: masks[name] for name in members}).sum()) == 1


def test_the_order_within_a_module_moves_masks_alone() -> None:
    model = swin()
    masks = dimap_masks(model, 0.6)
    permuted = copy.deepcopy(model)
    fc1 = "swin.encoder.layers.1.blocks.{}.mlp.fc1.weight"
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # two layers of a module change places, and their entries are shuffled
        order = torch.randperm(permuted.get_parameter(fc1.format(0)).numel(), generator=generator)
        for a, b in ((0, 1), (1, 0)):
            source = model.get_parameter(fc1.format(a))
            permuted.get_parameter(fc1.format(b)).copy_(source.flatten()[order].reshape(source.shape))
    again = dimap_masks(permuted, 0.6)
    for a, b in ((0, 1), (1, 0)):
        assert torch.equal(again[fc1.format(b)].flatten(), masks[fc1.format(a)].flatten()[order])
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items() if "layers.1" not in name)


def test_neither_data_nor_chance() -> None:
    model, calls = swin(), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    first = dimap_masks(model, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(torch.equal(mask, first[name]) for name, mask in dimap_masks(model, 0.5).items())
    assert not calls


def test_zeros_go_first() -> None:
    model = swin()
    once = dimap_prune(model, 0.4).model
    twice = dimap_prune(once, 0.4).model
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    assert all(not bool(((b != 0) & (a == 0)).any()) for a, b in zip(
        once.parameters(), dimap_prune(once, 0.6).model.parameters(), strict=True))  # fmt: skip


# --- modules -----------------------------------------------------------------------------------------

NAMES = {
    "layers.0.blocks.1.attn.qkv": ("qkv", "layers.0.blocks.1"),  # timm Swin
    "layers.0.blocks.1.attn.proj": ("proj", "layers.0.blocks.1"),
    "layers.0.blocks.1.mlp.fc1": ("mlp", "layers.0.blocks.1"),
    "layers.1.downsample.reduction": ("aux", ""),
    "patch_embed.proj": ("aux", ""),
    "head.fc": ("aux", ""),
    "features.1.0.attn.qkv": ("qkv", "features.1.0"),  # torchvision Swin
    "features.1.0.attn.proj": ("proj", "features.1.0"),
    "features.1.0.mlp.3": ("mlp", "features.1.0"),
    "features.2.reduction": ("aux", ""),
    "features.0.0": ("aux", ""),
    "blocks.3.attn.qkv": ("qkv", "blocks.3"),  # timm ViT
    "encoder.layers.encoder_layer_3.self_attention.in_proj_weight": ("qkv", "encoder.layers.encoder_layer_3"),
    "encoder.layers.encoder_layer_3.self_attention.out_proj": ("proj", "encoder.layers.encoder_layer_3"),
    "encoder.layers.encoder_layer_3.mlp.0": ("mlp", "encoder.layers.encoder_layer_3"),
    "layers.2.self_attn.in_proj_weight": ("qkv", "layers.2"),  # torch's own encoder
    "layers.2.linear1": ("mlp", "layers.2"),
    "vit.encoder.layer.0.attention.attention.query": ("qkv", "vit.encoder.layer.0"),  # older transformers
    "vit.encoder.layer.0.attention.output.dense": ("proj", "vit.encoder.layer.0"),
    "vit.encoder.layer.0.intermediate.dense": ("mlp", "vit.encoder.layer.0"),
    "vit.encoder.layer.0.output.dense": ("mlp", "vit.encoder.layer.0"),
    "bert.encoder.layer.0.attention.self.key": ("qkv", "bert.encoder.layer.0"),
    "model.layers.7.self_attn.k_proj": ("qkv", "model.layers.7"),  # Llama
    "model.layers.7.self_attn.o_proj": ("proj", "model.layers.7"),
    "model.layers.7.mlp.down_proj": ("mlp", "model.layers.7"),
    "transformer.h.0.attn.c_attn": ("qkv", "transformer.h.0"),  # GPT-2
    "transformer.h.0.attn.c_proj": ("proj", "transformer.h.0"),
    "transformer.h.0.mlp.c_proj": ("mlp", "transformer.h.0"),
    "gpt_neox.layers.0.attention.query_key_value": ("qkv", "gpt_neox.layers.0"),
    "lm_head": ("aux", ""),
}


@pytest.mark.parametrize("path", NAMES)
def test_the_layers_of_a_transformer_by_name(path: str) -> None:
    kind, stage, block = in_transformer(path)
    assert (kind, block) == NAMES[path]
    assert stage == block.rpartition(".")[0]


def test_the_layers_of_a_residual_network_by_name() -> None:
    assert in_resnet("layer3.1.downsample.0") == ("layer3", "layer3", "layer3.1")
    assert in_resnet("conv1") == in_resnet("fc") == ("aux", "", "")
    assert in_resnet("model.stages.2.1.conv1")[0] == "stages.2"  # timm


MODELS = {
    "swin": (swin, {"qkv": 9, "proj": 3, "mlp": 6, "aux": 3}),
    "vit": (vit, {"qkv": 6, "proj": 2, "mlp": 4, "aux": 2}),
    "deit": (lambda: vit("DeiT"), {"qkv": 6, "proj": 2, "mlp": 4, "aux": 2}),
    "llama": (llama, {"qkv": 6, "proj": 2, "mlp": 6, "aux": 1}),
    "resnet": (resnet, {"stages.0": 2, "stages.1": 5, "aux": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_modules_of_real_architectures(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    weights, _ = find_weights(model, ())
    assert {module: len(names) for module, names in pools(list(weights), "auto", "kind").items()} == expected
    changes = dimap_prune(model, 0.5)
    total = sum(weight.numel() for weight in weights.values())
    zeros = sum(int((changes.model.get_parameter(n) == 0).sum()) for n in weights)
    assert zeros == total // 2
    matrices = {
        n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() > 1
    }
    assert matrices <= set(changes.changed) | set(changes.left)
    kept = {n for n, p in model.named_parameters() if n not in weights}
    assert all(torch.equal(model.get_parameter(n), changes.model.get_parameter(n)) for n in kept)


def test_stages_and_blocks_of_a_swin() -> None:
    names = list(find_weights(swin(), ())[0])
    stages, blocks = pools(names, "auto", "stage"), pools(names, "auto", "block")
    assert len(stages) == 2 * 3 + 1
    assert len(blocks) == 3 * 3 + 1
    assert len(stages["swin.encoder.layers.1.blocks mlp"]) == 4
    assert len(blocks["swin.encoder.layers.1.blocks.1 mlp"]) == 2
    assert len(stages["aux"]) == len(blocks["aux"]) == 3
    assert len(pools(names, "auto", "layer")) == len(names)


def test_tables_and_tokens_are_named() -> None:
    left = dimap_prune(swin(), 0.5).left
    assert sum("relative_position_bias_table" in why for why in left.values()) == 3
    left = dimap_prune(vit(), 0.5).left
    assert any("cls_token" in why for why in left.values())


def test_position_biases_of_swin_v2_are_left() -> None:
    config = transformers.Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
                                       window_size=4)  # fmt: skip
    changes = dimap_prune(transformers.Swinv2ForImageClassification(config), 0.5)
    left = [name for name in changes.left if "continuous_position_bias" in name]
    assert len(left) == 4
    assert all("position bias" in changes.left[name] for name in left)
    assert any(name.endswith("attention.self.query") for name in changes.changed)


class Attention(nn.Module):
    """Two blocks whose projections are fused or not, with the same weights."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            parts = [(number + 1) * torch.randn(6, 6, generator=generator) for _ in range(4)]
            attn = nn.Module()
            if fused:
                attn.qkv = self._linear(torch.cat(parts[:3]))
            else:
                attn.q_proj, attn.k_proj, attn.v_proj = map(self._linear, parts[:3])
            attn.proj = self._linear(parts[3])
            block = nn.Module()
            block.attn = attn
            self.blocks.append(block)

    @staticmethod
    def _linear(weight: Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data.copy_(weight)
        return layer


@pytest.mark.parametrize("granularity", ["kind", "stage", "block"])
def test_fused_and_separate_projections_are_pruned_alike(granularity: str) -> None:
    scores = dimap_scores(Attention(True), granularity=granularity)
    apart = dimap_scores(Attention(False), granularity=granularity)
    masks = dimap_masks(Attention(True), 0.6, granularity=granularity)
    separate = dimap_masks(Attention(False), 0.6, granularity=granularity)
    for n in range(2):
        keys = [f"blocks.{n}.attn.{part}_proj.weight" for part in "qkv"]
        assert torch.allclose(scores[f"blocks.{n}.attn.qkv.weight"], torch.cat([apart[k] for k in keys]), atol=1e-12)
        assert torch.equal(masks[f"blocks.{n}.attn.qkv.weight"], torch.cat([separate[k] for k in keys]))


def test_torch_attention_is_pruned_too() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for hold in (False, True):
        changes = dimap_prune(model, 0.5, hold=hold)
        assert {"layers.0.self_attn", "layers.0.self_attn.out_proj", "layers.1.linear2"} <= set(changes.changed)
        made, x = changes.model, torch.randn(2, 5, 8)
        out = made(x)
        out.square().mean().backward()
        optimizer = torch.optim.SGD(made.parameters(), 0.5, momentum=0.9)
        optimizer.step()
        if hold:
            masks = dimap_masks(model, 0.5)
            for name, mask in masks.items():
                path, _, short = name.rpartition(".")
                now = getattr(made.get_submodule(path), short)
                assert not bool(now[~mask].any())
                assert bool((now[mask] != model.get_parameter(name)[mask]).any()), "what is left is trained"
    made = dimap_prune(model.eval(), 0.5).model
    weights = find_weights(model, ())[0]
    found = count_operations(made, torch.randn(1, 5, 8))
    zeros = sum(int((made.get_parameter(name) == 0).sum()) for name in weights)
    assert found.dense - found.kept == 5 * zeros
    assert found.dense == 5 * sum(w.numel() for w in weights.values()) + 2 * 2 * 5 * 5 * 8  # two products a block


def test_modules_of_ones_own() -> None:
    model = perceptron(4, 6, 5, 3)
    by_pattern = dimap_scores(model, modules={r"^(0|2)\.": "outer", r"(\d)": r"layer \1"})
    by_function = dimap_scores(model, modules=lambda name: "middle" if name.startswith("1") else "ends")
    assert all(torch.equal(by_pattern[name], by_function[name]) for name in by_pattern)
    assert torch.allclose(by_pattern["1.weight"], lamp(model[1].weight), atol=1e-9)
    skipped = dimap_prune(model, 0.5, granularity="layer", skip=["2"])
    assert skipped.changed == ("0", "1")
    assert skipped.left == {"2": "skipped as asked"}


# --- training with masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_masks_are_kept_through_training_and_files(kind: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    model = swin()
    masks = dimap_masks(model, 0.6)
    held = dimap_prune(model, 0.6, hold=True)
    plain = dimap_prune(model, 0.6).model
    x = torch.randn(4, 1, 32, 32)
    assert torch.equal(held.model(x).logits, plain(x).logits)
    made: Any = held.model
    optimizer = kind(made.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(x).logits, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    out = made(x).logits
    other = dimap_prune(swin(1), 0.3, hold=True).model  # other weights, other masks
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x).logits, out)
    assert torch.equal(copy.deepcopy(made)(x).logits, out)
    bake_masks(made)
    assert torch.equal(made(x).logits, out)
    assert not any(parametrize.is_parametrized(module) for module in made.modules())
    moved = 0
    for name, mask in masks.items():
        assert not bool(made.get_parameter(name)[~mask].any())
        moved += int((made.get_parameter(name) != model.get_parameter(name))[mask].sum())
    assert moved > 1000
    packed = pack_sparse(made).model
    assert torch.equal(packed(x).logits, out)
    again = load_packed(save_packed(packed, tmp_path / "small"), into=swin(2))
    assert torch.equal(again(x).logits, out)


def test_masks_go_into_torch_prune() -> None:
    model = swin()
    expected = dimap_prune(model, 0.5).model
    for name, mask in dimap_masks(model, 0.5).items():
        torch_prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(model(x).logits, expected(x).logits)
    with pytest.raises(ModulesError, match=r"projection is pruned by torch.*prune\.remove"):
        dimap_prune(model, 0.6)
    for name in dimap_masks(swin(), 0.5):
        torch_prune.remove(model.get_submodule(name.removesuffix(".weight")), "weight")
    assert torch.equal(dimap_prune(model, 0.5).model(x).logits, expected(x).logits)


def test_parametrised_layers_are_left() -> None:
    model = swin()
    parametrize.register_parametrization(model.classifier, "weight", nn.Identity())
    changes = dimap_prune(model, 0.5)
    assert "bake that in" in changes.left["classifier"]
    assert not any("parametrizations" in name for name in changes.left)
    attention = nn.MultiheadAttention(4, 2)
    parametrize.register_parametrization(attention, "in_proj_weight", nn.Identity())
    changes = dimap_prune(attention, 0.5, granularity="layer")
    assert changes.changed == ("out_proj",)
    assert "bake that in" in changes.left[""]


def test_a_shared_weight_is_masked_in_each_of_its_places() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model[2].weight = model[0].weight
    changes = dimap_prune(model, 0.5, granularity="layer", hold=True)
    assert changes.changed == ("0", "2", "4")
    made: Any = changes.model
    assert int((made[0].weight == 0).sum() + (made[4].weight == 0).sum()) == 17
    made(torch.ones(1, 5)).sum().backward()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.sub_(parameter.grad)
    bake_masks(made)
    assert torch.equal(made[0].weight, made[2].weight)
    assert int((made[0].weight == 0).sum() + (made[4].weight == 0).sum()) == 17


# --- operations and neurons --------------------------------------------------------------------------


def test_operations_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 36, 10),
    )  # fmt: skip
    positions = {0: 64, 2: 9, 3: 9, 5: 1}
    dense = sum(model[n].weight.numel() * p for n, p in positions.items())
    x = torch.randn(2, 3, 8, 8)
    found = count_operations(model, x)
    assert (found.dense, found.kept) == (2 * dense, 2 * dense)
    pruned = dimap_prune(model, 0.5, granularity="layer").model
    spared = sum(int((pruned[n].weight == 0).sum()) * p for n, p in positions.items())
    assert count_operations(pruned, x).kept == 2 * (dense - spared)
    held = dimap_prune(model, 0.5, granularity="layer", hold=True).model
    assert count_operations(held, x).kept == 2 * (dense - spared)


def test_operations_of_a_swin_with_its_attention() -> None:
    model = swin()
    x = torch.randn(1, 1, 32, 32)
    found = count_operations(model, x)
    tokens = {"layers.0": 64, "layers.1": 16, "embeddings": 64, "classifier": 1}
    weights = find_weights(model, ())[0]
    linear = 0
    for name, weight in weights.items():
        positions = next(n for key, n in tokens.items() if key in name)
        linear += weight.numel() * (16 if "reduction" in name else positions)
    attention = 2 * (64 * 16 * 16) + 2 * 2 * (16 * 16 * 32)  # tokens x window x width, two products a block
    assert found.dense == found.kept == linear + attention
    assert 0 < count_operations(dimap_prune(model, 0.5).model, x).saved < 0.6
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_operations_of_a_language_model() -> None:
    model, ids = llama(), torch.randint(40, (1, 7))
    found = count_operations(model, {"input_ids": ids})
    weights = find_weights(model, ())[0]
    attention = 2 * 2 * 7 * 7 * 16  # two products in each of two blocks
    assert found.dense == 7 * sum(weight.numel() for weight in weights.values()) + attention
    pruned = dimap_prune(model, 0.5).model
    zeros = sum(int((pruned.get_parameter(name) == 0).sum()) for name in weights)
    assert count_operations(pruned, (ids,)).kept == found.dense - 7 * zeros


def test_neurons_go_by_their_summed_scores() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    scores = dimap_scores(model, granularity="layer")
    sums = dimap_neuron_scores(model, granularity="layer")
    first, second = find_sites(model)
    assert torch.allclose(sums[first.name], scores["0.weight"].sum(1) + scores["2.weight"].sum(0))
    assert torch.allclose(sums[second.name], scores["2.weight"].sum(1) + scores["4.weight"].sum(0))
    changes = dimap_prune_neurons(model, 0.5, torch.randn(1, 4), granularity="layer")
    pool = torch.cat([sums[first.name], sums[second.name]])
    keep = torch.ones(11, dtype=torch.bool)
    keep[pool.argsort()[:5]] = False
    if not bool(keep[:6].any()) or not bool(keep[6:].any()):
        pytest.fail("choose a seed at which no layer is emptied")
    x = torch.randn(3, 4)
    hidden = torch.relu(model[0](x)) * keep[:6]
    hidden = torch.relu(model[2](hidden)) * keep[6:]
    assert torch.allclose(changes.model(x), model[4](hidden), atol=1e-6)
    assert changes.model[0].out_features == int(keep[:6].sum())


def test_a_swin_loses_neurons_and_no_layer_all() -> None:
    model, x = swin(), torch.randn(1, 1, 32, 32)
    changes = dimap_prune_neurons(model, 0.99, x)
    widths = [m.out_features for name, m in changes.model.named_modules() if name.endswith("fc1")]
    assert min(widths) == 1
    assert sum(widths) == max(3, sum(s.width for s in find_sites(model)) - math.floor(0.99 * (64 + 128 + 128)))
    assert torch.isfinite(changes.model(x).logits).all()
    few = dimap_prune_neurons(model, 0.3, x).model
    assert count_operations(few, x).dense < 0.9 * count_operations(model, x).dense


# --- bad input ---------------------------------------------------------------------------------------


def test_bad_input() -> None:
    model = perceptron(4, 6, 3)
    for ratio in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="ratio"):
            dimap_prune(model, ratio, granularity="layer")
    with pytest.raises(ModulesError, match="granularity='layer'"):
        dimap_prune(model, 0.5)
    with pytest.raises(ValueError, match="granularity='row'"):
        dimap_prune(model, 0.5, granularity="row")
    with pytest.raises(ValueError, match="modules='swin'"):
        dimap_prune(model, 0.5, modules="swin")
    with pytest.raises(ModulesError, match=r"in no module: 1\.weight"):
        dimap_prune(model, 0.5, modules={r"^0": "a"})
    with pytest.raises(ModulesError, match="no weight matches"):
        dimap_prune(model, 0.5, modules={r"^0": "a", "conv": "b", ".*": "c"})
    with pytest.raises(ValueError, match="goes with a preset"):
        dimap_prune(model, 0.5, modules={".*": "a"}, granularity="block")
    with pytest.raises(ModulesError, match="nothing to prune"):
        dimap_prune(nn.Sequential(nn.ReLU()), 0.5)
    with pytest.raises(ModulesError, match="nothing to prune"):
        dimap_prune(model, 0.5, granularity="layer", skip=["*"])
    with pytest.raises(ValueError, match="share"):
        dimap_prune_neurons(model, 1.5, torch.randn(1, 4), granularity="layer")
    with pytest.raises(ModelError, match="shape"):
        hold_masks(model, {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    model[1].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1\.weight holds NaN"):
        dimap_prune(model, 0.5, granularity="layer")
    packed = pack_sparse(dimap_prune(perceptron(64, 64), 0.9, granularity="layer").model).model
    assert any(is_packed(module) for module in packed.modules())
    with pytest.raises(ValueError, match="compressed already"):
        dimap_prune(packed, 0.5, granularity="layer")


def test_nan_in_a_fused_attention_is_named() -> None:
    model = nn.MultiheadAttention(4, 2)
    model.in_proj_weight.data[0, 0] = math.inf
    with pytest.raises(ModulesError, match="in_proj_weight holds NaN"):
        dimap_prune(model, 0.5, granularity="layer")


def test_it_says_what_it_did() -> None:
    changes = dimap_prune(llama(), 0.5)
    assert isinstance(changes, Changes)
    assert "neither a linear map" in changes.left["model.embed_tokens"]
    half = llama().to(torch.bfloat16)
    made = dimap_prune(half, 0.5).model
    assert made.lm_head.weight.dtype == torch.bfloat16
