"""Neurons are found by structure, seen and held; the model is as it was afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuropil.errors import NoNeurons, UnknownNeuron
from neuropil.neurons import Neuron, Weight, activation, capture, capture_inputs, clamp, find_sites


def _causal(kind: str, **settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    small = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **{**small, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def _llama(**settings: Any) -> nn.Module:
    return _causal("llama", intermediate_size=24, num_key_value_heads=1, **settings)


def _gpt_oss() -> nn.Module:
    model = _causal("gpt_oss", intermediate_size=12, num_local_experts=3, num_experts_per_tok=2, head_dim=8,
                    num_key_value_heads=1, layer_types=["full_attention", "full_attention"])  # fmt: skip
    for p in model.parameters():  # its biases are not initialised
        with torch.no_grad():
            p.normal_(0, 0.3)
    return model


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                               num_attention_heads=2, image_size=16, patch_size=8)).eval()  # fmt: skip


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1])).eval()


def _chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).eval()


def _conv_chain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 4, 10)).eval()  # fmt: skip


class _FusedSwapped(nn.Module):
    """Up first, gate second, in one map: the other way round than most."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.outer = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        return self.outer(value * torch.nn.functional.gelu(gate))


MODELS = {
    "llama": (_llama, torch.arange(3, 15).reshape(2, 6)),
    "gpt2": (lambda: _causal("gpt2", n_inner=24), torch.arange(3, 15).reshape(2, 6)),
    "phi3": (lambda: _causal("phi3", intermediate_size=24), torch.arange(3, 15).reshape(2, 6)),
    "gpt_neox": (lambda: _causal("gpt_neox", intermediate_size=24), torch.arange(3, 15).reshape(2, 6)),
    "opt": (lambda: _causal("opt", ffn_dim=24, word_embed_proj_dim=16), torch.arange(3, 15).reshape(2, 6)),
    "bert": (lambda: _causal("bert", intermediate_size=24), torch.arange(3, 15).reshape(2, 6)),
    "mixtral": (lambda: _causal("mixtral", intermediate_size=12, num_local_experts=3, num_key_value_heads=1),
                torch.arange(3, 15).reshape(2, 6)),
    "gpt_oss": (_gpt_oss, torch.arange(3, 15).reshape(2, 6)),
    "vit": (_vit, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))),
    "resnet": (_resnet, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))),
    "chain": (_chain, torch.randn(2, 3, generator=torch.Generator().manual_seed(0))),
    "conv chain": (_conv_chain, torch.randn(2, 1, 14, 14, generator=torch.Generator().manual_seed(0))),
    "swapped": (_FusedSwapped, torch.randn(2, 6, generator=torch.Generator().manual_seed(0))),
}  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: make() for name, (make, _) in MODELS.items()}


def _run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", MODELS)
class TestEveryArchitecture:
    def test_activation_follows_from_the_weights_it_claims_to_read(self, models: Any, name: str) -> None:
        model, x = models[name], MODELS[name][1]
        tensors = model.state_dict()
        with capture(model) as seen, capture_inputs(model) as read:
            _run(model, x)
        assert seen
        for site in find_sites(model):
            if site.name in seen:
                h = activation(site, read[site.name], tensors.__getitem__).reshape(seen[site.name].shape)
                torch.testing.assert_close(h, seen[site.name], atol=1e-5, rtol=1e-5)

    def test_every_site_moves_the_output_and_leaves_no_trace(self, models: Any, name: str) -> None:
        model, x = models[name], MODELS[name][1]
        state = copy.deepcopy(model.state_dict())
        before = _run(model, x)
        with capture(model) as seen:
            _run(model, x)
        for site in (s for s in find_sites(model) if s.name in seen):
            for where in ("hidden", "up"):
                with clamp(model, {f"{site.number}:{i}": 9.0 for i in range(site.width)}, where=where):
                    assert not torch.equal(_run(model, x), before), (site.name, where)
        assert torch.equal(_run(model, x), before)
        assert all(torch.equal(a, state[n]) for n, a in model.state_dict().items())

    def test_the_same_sites_on_the_meta_device(self, models: Any, name: str) -> None:
        with torch.device("meta"):
            weightless = MODELS[name][0]()
        assert {p.device.type for p in weightless.parameters()} == {"meta"}
        assert find_sites(weightless) == find_sites(models[name])

    def test_a_clamp_to_its_own_value_changes_nothing(self, models: Any, name: str) -> None:
        model, x = models[name], MODELS[name][1]
        before = _run(model, x)
        with capture(model) as seen:
            _run(model, x)
        site = find_sites(model)[0]
        if site.name not in seen or site.kind == "expert":
            pytest.skip("the rows of an expert are tokens: one value a row has no place")
        own = seen[site.name].select(site.tap.axis, 1)
        with clamp(model, {f"{site.number}:1": own}):
            assert torch.equal(_run(model, x), before)

    def test_a_neuron_that_writes_nothing_can_be_clamped_without_effect(self, models: Any, name: str) -> None:
        model, x = copy.deepcopy(models[name]), MODELS[name][1]
        site = next(s for s in find_sites(model) if s.write is not None)
        with torch.no_grad():
            down = dict(model.named_parameters())[site.weight("down").name]
            places = torch.arange(down.numel()).view(down.shape)
            down.view(-1)[site.weight("down").rows(places, site.width)[1]] = 0
        before = _run(model, x)
        with clamp(model, {Neuron(site.number, 1): 100.0}):
            assert torch.equal(_run(model, x), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "opt"])
def test_zero_up_equals_zero_hidden_equals_zero_column(models: Any, name: str) -> None:
    model, x = copy.deepcopy(models[name]), MODELS[name][1]
    neutral = -1.0 if name == "gpt_oss" else 0.0  # gpt-oss's activation is (up + 1) * glu(gate)
    if name in ("gpt2", "opt"):  # f(0) = 0 for gelu and relu
        assert find_sites(model)[0].kind == "dense"
    with capture(model) as seen:
        _run(model, x)
    site = next(s for s in find_sites(model) if s.name in seen)
    with clamp(model, {f"{site.number}:3": neutral}, where="up"):
        by_up = _run(model, x)
    with clamp(model, {f"{site.number}:3": 0.0}, where="hidden"):
        by_hidden = _run(model, x)
    down = site.weight("down")
    with torch.no_grad():
        down.rows(dict(model.named_parameters())[down.name], site.width)[3].zero_()
    torch.testing.assert_close(by_up, by_hidden, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(by_hidden, _run(model, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "resnet", "vit"])
def test_one_value_a_row_equals_single_runs(models: Any, name: str) -> None:
    model, x = models[name], MODELS[name][1]
    values = torch.tensor([3.0, -2.0])
    with clamp(model, {"1:2": values}):
        together = _run(model, x)
    for k, value in enumerate(values.tolist()):
        with clamp(model, {"1:2": value}):
            torch.testing.assert_close(together[k], _run(model, x[k : k + 1])[0], atol=1e-5, rtol=1e-5)


def test_one_value_a_row_is_refused_for_an_expert(models: Any) -> None:
    model, x = models["mixtral"], MODELS["mixtral"][1]
    with (
        clamp(model, {f"{n}:0": torch.tensor([1.0, 2.0]) for n in range(3)}),
        pytest.raises(ValueError, match="tokens, not rows"),
    ):
        _run(model, x)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("where", ["hidden", "up"])
def test_generation_with_cache_equals_generation_without(models: Any, name: str, where: str) -> None:
    model: Any = models[name]
    x = MODELS[name][1]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    plain = model.generate(x, use_cache=True, **settings)
    held = {f"{s.number}:{i}": 20.0 for s in find_sites(model) for i in (1, 2)}
    with clamp(model, held, where=where):
        cached = model.generate(x, use_cache=True, **settings)
        whole = model.generate(x, use_cache=False, **settings)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, plain)
    assert torch.equal(model.generate(x, use_cache=True, **settings), plain)


def test_the_model_is_restored_after_an_exception(models: Any) -> None:
    for name in ("llama", "mixtral"):
        model, x = models[name], MODELS[name][1]
        before = _run(model, x)
        with pytest.raises(RuntimeError), clamp(model, {"0:0": 5.0}), capture(model):
            model(torch.zeros(3, dtype=torch.float32)[None, None, None])
        with pytest.raises(KeyboardInterrupt), clamp(model, {"0:0": 5.0}):
            raise KeyboardInterrupt
        assert torch.equal(_run(model, x), before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_are_seen_whatever_their_implementation(models: Any, implementation: str) -> None:
    model: Any = copy.deepcopy(models["mixtral"])
    x = MODELS["mixtral"][1]
    with capture(models["mixtral"]) as reference:
        _run(models["mixtral"], x)
    model.set_experts_implementation(implementation)
    with capture(model) as seen:
        _run(model, x)
    assert model.config._experts_implementation == implementation
    assert seen.keys() == reference.keys()
    for name, h in seen.items():  # the order of an expert's tokens is its implementation's affair
        rows, expected = h[h[:, 0].argsort()], reference[name][reference[name][:, 0].argsort()]
        torch.testing.assert_close(rows, expected, atol=1e-6, rtol=1e-6)


def test_experts_see_the_tokens_routed_to_them(models: Any) -> None:
    model, x = models["mixtral"], MODELS["mixtral"][1]
    with capture(model) as seen:
        _run(model, x)
    first = [h for name, h in seen.items() if name.startswith("model.layers.0.")]
    assert sum(len(h) for h in first) == x.numel() * model.config.num_experts_per_tok


def test_conv1d_and_linear_give_the_same_rows() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    up, down = nn.Linear(4, 6), nn.Linear(6, 4)
    turned_up, turned_down = Conv1D(6, 4), Conv1D(4, 6)
    with torch.no_grad():
        turned_up.weight.copy_(up.weight.T)
        turned_down.weight.copy_(down.weight.T)
    for role in ("up", "down"):
        rows = []
        for net in (nn.Sequential(up, nn.GELU(), down), nn.Sequential(turned_up, nn.GELU(), turned_down)):
            [site] = find_sites(net)
            rows.append(site.weight(role).rows(net.state_dict()[site.weight(role).name], site.width))
        assert torch.equal(*rows)


def test_halves_the_other_way_round_are_told_apart() -> None:
    [site] = find_sites(_FusedSwapped())
    assert (site.kind, site.width) == ("gated", 8)
    assert (site.reads["up"].start, site.reads["gate"].start) == (0, 8)


def test_interleaved_gate_and_up_are_told_apart(models: Any) -> None:
    site = find_sites(models["gpt_oss"])[0]
    assert (site.reads["gate"].start, site.reads["gate"].step) == (0, 2)
    assert (site.reads["up"].start, site.reads["up"].step) == (1, 2)
    assert site.kind == "expert"


def test_lora_wrappers_are_seen_through() -> None:
    peft = pytest.importorskip("peft")
    plain = _llama()
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj", "q_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    sites = find_sites(model)
    assert [s.width for s in sites] == [s.width for s in find_sites(plain)]
    assert sites[0].reads["up"].name.endswith("mlp.up_proj.base_layer.weight")
    x = MODELS["llama"][1]
    with clamp(model, {"0:2": 0.0}, where="up"):
        by_up = _run(model, x)
    with clamp(model, {"0:2": 0.0}):
        torch.testing.assert_close(by_up, _run(model, x), atol=1e-6, rtol=1e-6)


def test_experts_that_are_modules_are_all_found_though_few_run() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.router = nn.Linear(4, 5)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)) for _ in range(5))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            best = int(self.router(x).mean((0, 1)).argmax())
            return x + self.experts[best](x)

    sites = find_sites(Mixture())
    assert [s.kind for s in sites] == ["expert"] * 5
    assert len({s.name for s in sites}) == 5


def test_sites_are_numbered_like_the_blocks_of_a_decoder(models: Any) -> None:
    sites = find_sites(models["llama"])
    assert [(s.number, s.layer, s.name) for s in sites] == [(0, 0, "model.layers.0.mlp"), (1, 1, "model.layers.1.mlp")]
    assert sites[0].roles == ("up", "gate", "down")
    with pytest.raises(KeyError, match="no 'gate' weight"):
        find_sites(models["gpt2"])[0].weight("gate")


def test_a_large_model_without_weights_is_mapped() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=4,
                                             num_attention_heads=64, num_key_value_heads=8))  # fmt: skip
    assert [s.width for s in find_sites(model)] == [28672] * 4


def test_what_is_no_layer_of_neurons() -> None:
    with pytest.raises(NoNeurons, match="Linear"):
        find_sites(nn.Linear(3, 4))
    with pytest.raises(NoNeurons):  # two linear maps in a row have no nonlinearity
        find_sites(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    with pytest.raises(NoNeurons):
        find_sites(nn.MultiheadAttention(8, 2, batch_first=True))


@pytest.mark.parametrize(
    ("address", "message"),
    [("0:5", "neurons 0 to 4"), ("7:0", "run from 0 to 1"), ("dog", "SITE:INDEX"), ("0:-1", "SITE:INDEX"),
     ("0:", "SITE:INDEX"), (":3", "no site")],
)  # fmt: skip
def test_addresses_that_name_no_neuron(address: str, message: str) -> None:
    with pytest.raises(UnknownNeuron, match=message):
        Neuron.parse(address, find_sites(_chain()))


def test_an_address_is_read_back() -> None:
    sites = find_sites(_llama())
    for site in sites:
        neuron = Neuron.parse(f"{site.name}:3", sites)
        assert Neuron.parse(str(neuron), sites) == neuron
        assert neuron.site == site.name


def test_where_must_be_known(models: Any) -> None:
    with pytest.raises(ValueError, match="hidden"), clamp(models["chain"], {"0:0": 1.0}, where="gate"):
        pass


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 5),
    step=st.integers(1, 3),
    start=st.integers(0, 3),
    fan=st.integers(1, 4),
    axis=st.integers(0, 1),
)
def test_rows_are_the_entries_of_a_strided_slice(width: int, step: int, start: int, fan: int, axis: int) -> None:
    length = start + step * width
    tensor = torch.randn(length, fan)
    stored = tensor if axis == 0 else tensor.T.contiguous()
    rows = Weight("w", axis, start, step).rows(stored, width)
    assert torch.equal(rows, torch.stack([tensor[start + step * i] for i in range(width)]))
    assert rows.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    stacked = torch.stack([torch.zeros_like(stored), stored])
    assert torch.equal(Weight("w", axis, start, step, expert=1).rows(stacked, width), rows)


def test_rows_of_flattened_feature_maps_belong_to_their_filter() -> None:
    net = _conv_chain()
    site = find_sites(net)[1]
    rows = site.weight("down").rows(net.state_dict()["7.weight"], 6)
    assert rows.shape == (6, 160)
    assert torch.equal(rows[2].reshape(16, 10), net[7].weight[:, 32:48].T)


def test_a_model_in_training_has_the_same_neurons() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    [site] = find_sites(net)
    assert (site.width, site.write is not None) == (8, True)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
