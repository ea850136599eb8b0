"""Every family: tensors are those transformers loads; head and gains are what the model multiplies by."""

from pathlib import Path

import pytest
import torch
from torch import nn

from neuropil.errors import ModelError
from neuropil.models import load

from .families import FAMILIES, build, saved

CAUSAL = [
    "llama", "llama-untied", "gemma", "gemma2", "gemma3", "gpt2", "neox", "gptj", "opt", "phi3", "bloom", "nemotron",
    "olmo2", "mixtral", "gptoss",
]  # fmt: skip
NORMED = [
    "llama",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "neox",
    "phi3",
    "nemotron",
    "mixtral",
    "bert",
    "vit",
    "convnext",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_transformers_loads(family: str, tmp_path: Path) -> None:
    module = saved(family, tmp_path)
    model = load(tmp_path)
    state = module.state_dict()
    wrong = [name for name in state if not torch.equal(model.tensor(name), state[name].float())]
    assert wrong == []
    assert model.parameters == sum(p.numel() for p in module.parameters())
    assert model.architecture == type(module).__name__
    assert model.sites
    for site in model.sites:
        for role in site.roles:
            rows = model.rows(site, role)
            assert rows.shape[0] == site.width
            assert torch.equal(rows, load(module).rows(site, role))


@pytest.mark.parametrize("family", CAUSAL)
def test_head_gives_the_models_logits(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    model = load(tmp_path)
    head = model.head()
    module = model.module()
    assert head.gain is not None
    assert head.note == ""
    inputs: list[torch.Tensor] = []
    norm_name = model._trace.feeds[model._head_name]
    norm = module.get_submodule(norm_name)
    norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    ids = torch.tensor([[1, 5, 9, 33]])
    with torch.no_grad():
        logits = module(input_ids=ids).logits
    x = inputs[-1]
    if isinstance(getattr(norm, "bias", None), nn.Parameter):  # a LayerNorm takes the mean away and adds a bias
        x = x - x.mean(-1, keepdim=True)
        shift = norm.bias.detach() @ head.weight.T
    else:
        shift = 0
    normalised = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    ours = (normalised * head.gain) @ head.weight.T + shift + (0 if head.bias is None else head.bias)
    if cap := getattr(module.config, "final_logit_softcapping", None):
        ours = cap * torch.tanh(ours / cap)
    torch.testing.assert_close(ours, logits, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", NORMED)
def test_gain_is_what_the_norm_before_the_neurons_multiplies_by(family: str, tmp_path: Path) -> None:
    module = saved(family, tmp_path)
    model = load(tmp_path)
    site = model.sites[0]
    gain = model.gain(site)
    assert gain is not None
    norm = module.get_submodule(model._trace.feeds[model._owner(site.weight("up").name)])
    x = torch.randn(1, 3, len(gain))
    x = x - x.mean(-1, keepdim=True)
    with torch.no_grad():
        seen = norm(x)
    expected = x / x.pow(2).mean(-1, keepdim=True).sqrt() * gain
    bias = getattr(norm, "bias", None)
    torch.testing.assert_close(seen, expected + (0 if bias is None else bias), atol=1e-4, rtol=1e-3)


def test_no_gain_where_the_norm_comes_after() -> None:
    model = load(build("olmo2"))  # normalises what the MLP writes, not what it reads
    assert [model.gain(site) for site in model.sites] == [None, None]


def test_tied_and_untied_heads_are_read_alike(tmp_path: Path) -> None:
    tied = saved("llama", tmp_path / "tied")
    untied = saved("llama-untied", tmp_path / "untied")
    assert torch.equal(load(tmp_path / "tied").head().weight, tied.model.embed_tokens.weight)
    assert torch.equal(load(tmp_path / "untied").head().weight, untied.lm_head.weight)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


def test_a_projection_before_the_head_is_multiplied_in(tmp_path: Path) -> None:
    module = saved("opt-projected", tmp_path)
    head = load(tmp_path).head()
    assert head.weight.shape == (64, 32)
    x = torch.randn(5, 32)
    expected = module.lm_head(module.model.decoder.project_out(x))
    torch.testing.assert_close(x @ head.weight.T, expected)
    assert "project_out" in head.note


def test_heads_of_masked_models_say_what_lies_before(tmp_path: Path) -> None:
    module = saved("bert", tmp_path)
    head = load(tmp_path).head()
    assert torch.equal(head.weight, module.cls.predictions.decoder.weight)
    assert torch.equal(head.bias, module.cls.predictions.decoder.bias)
    assert "transform of the head's own" in head.note
    assert "transform of the head's own" in load(build("roberta")).head().note
    with pytest.raises(ModelError, match="reads 16 numbers but the residual stream has 32"):
        load(build("electra")).head()


def test_models_without_a_head_say_so(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    with pytest.raises(ModelError, match="no language-model head"):
        load(tmp_path).head()
    module = build("llama").model
    assert load(module).sites
    with pytest.raises(ModelError, match="no language-model head"):
        load(module).head()


def test_base_model_checkpoint_without_prefix_is_read(tmp_path: Path) -> None:
    module = build("bert")
    module.bert.save_pretrained(tmp_path)  # names without "bert."
    text = (tmp_path / "config.json").read_text().replace('"BertModel"', '"BertForMaskedLM"')
    (tmp_path / "config.json").write_text(text)
    model = load(tmp_path)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(model.tensor(name), module.state_dict()[name])
    with pytest.raises(ModelError, match="holds no tensor for 'cls"):
        model.tensor("cls.predictions.transform.dense.weight")


def test_shards_and_number_formats(tmp_path: Path) -> None:
    module = saved("llama", tmp_path / "whole")
    module.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load(tmp_path / "whole"), load(tmp_path / "shards")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(whole.tensor(name), shards.tensor(name))
    assert whole.fingerprint == shards.fingerprint
    module.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    half = load(tmp_path / "bf16")
    assert half.tensor(name).dtype == torch.float32
    assert torch.equal(half.tensor(name), module.state_dict()[name].float())
    assert half.fingerprint != whole.fingerprint
    assert next(half.module().parameters()).dtype == torch.float32
    assert next(half.module(torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert half.module() is half.module()


def test_torch_files_are_read_without_unpickling(tmp_path: Path) -> None:
    module = saved("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    model = load(tmp_path)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.equal(model.tensor(name), module.state_dict()[name])
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load(tmp_path).tensor(name), module.state_dict()[name])
    assert torch.equal(load(tmp_path).module().state_dict()[name], module.state_dict()[name])


class Wrapped(nn.Module):
    """A linear map under a low-rank update, laid out as the peft library does."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        self.scaling = {"default": 0.5}
        self.active_adapters = ["default"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


def test_lora_updates_are_in_the_rows() -> None:
    module = build("llama-untied")
    mlp = module.model.layers[1].mlp
    plain = mlp.up_proj
    mlp.up_proj = Wrapped(plain)
    module.lm_head = Wrapped(module.lm_head)
    model = load(module)
    x = torch.randn(4, 32)
    rows = model.rows(model.sites[1], "up")
    torch.testing.assert_close(x @ rows.T, mlp.up_proj(x).detach())
    assert not torch.allclose(rows, plain.weight)
    torch.testing.assert_close(x @ model.head().weight.T, module.lm_head(x).detach())


def test_a_module_in_memory_is_left_as_it_was() -> None:
    module = build("gemma").train()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = load(module)
    for site in model.sites:
        model.rows(site, "up")
        model.gain(site)
    model.head()
    assert model.module() is module
    assert module.training
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    with pytest.raises(ModelError, match="no tokenizer came with the model"):
        model.tokens()


def test_plain_networks() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))
    model = load(net)
    assert torch.equal(model.rows(model.sites[0], "down"), net[2].weight.T)
    assert model.gain(model.sites[0]) is None
    assert model.config is None
    assert model.tokenizer is None
    with pytest.raises(ModelError, match="no language-model head"):
        model.head()
    with pytest.raises(ModelError, match="has no tensor 'nothing'"):
        model.tensor("nothing")
