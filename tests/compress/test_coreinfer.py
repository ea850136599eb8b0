"""CoreInfer: the sets by their closed forms, the small model against a masked one, and generation with the cache."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from tiny_models import llama, words
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
)

from neuropil import models
from neuropil.changes import Changes
from neuropil.compress import (
    CoreClusters,
    CoreInfer,
    core_neurons,
    only,
    restrict,
    semantic_similarity_report,
    stability_curve,
)
from neuropil.compress._coreinfer_usage import Usage, token_core
from neuropil.errors import ModelError
from neuropil.neurons import capture, find_sites
from neuropil.packed import Affine, pack

ALL = slice(None)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 60,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def opt(seed: int = 0, layers: int = 3) -> Any:
    torch.manual_seed(seed)
    config = OPTConfig(**SHAPE | {"num_hidden_layers": layers}, ffn_dim=64, word_embed_proj_dim=32)
    net = AutoModelForCausalLM.from_config(config).eval()
    for name, p in net.named_parameters():
        if name.endswith("fc1.bias"):
            nn.init.normal_(p, std=0.1)
    return net


def family(name: str) -> Any:
    torch.manual_seed(0)
    configs = {
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=2),
        "phi3": lambda: Phi3Config(**SHAPE, intermediate_size=64, num_key_value_heads=2),
    }
    return (
        {"opt": opt, "llama": llama}[name]()
        if name not in configs
        else AutoModelForCausalLM.from_config(configs[name]()).eval()
    )


def ids(length: int = 12, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@contextmanager
def masked(model: nn.Module, cores: dict[str, Tensor]) -> Iterator[None]:
    """The dense model with every activation outside the sets at zero: the definition, slowly."""
    with ExitStack() as stack:
        for site in find_sites(model):
            if site.name in cores:
                gate = torch.zeros(site.width)
                gate[cores[site.name]] = 1
                owner = model.get_submodule(site.tap.module)
                stack.callback(owner.register_forward_pre_hook(lambda _, args, g=gate: (args[0] * g,)).remove)
        yield


@torch.no_grad()
def continued(model: Any, prompt: Tensor, rest: Tensor, **prompt_arguments: Any) -> Tensor:
    """Logits of the tokens after the prompt, read with its cache."""
    cache = model(prompt, use_cache=True, **prompt_arguments).past_key_values
    out: Tensor = model(rest, past_key_values=cache, use_cache=True).logits
    return out


def specimen(seed: int) -> tuple[Any, Any, Any]:
    model, prompt = opt(seed), ids(seed=seed)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net(x, use_cache=False).logits
            return out

    def act(wrapped: Any) -> Changes:
        return restrict(wrapped, core_neurons(wrapped, prompt, layers=slice(0, 2)))

    return Logits(), act, (prompt,)


# --- the sets --------------------------------------------------------------------------------------------


def test_token_core_by_hand() -> None:
    h = torch.tensor([[5.0, -9.0, 3.0, 1.0], [0.0, 2.0, 2.0, 2.0]])
    # signed: 3 positive scores a token on average, so 2 at alpha 0.67; ties go to the lower index
    assert token_core(h, 0.67, "signed").tolist() == [[True, False, True, False], [False, True, True, False]]
    # abs: 3.5 on average
    assert token_core(h, 0.6, "abs").tolist() == [[True, True, False, False], [False, True, True, False]]
    assert not token_core(-h.abs(), 1.0, "signed").any(), "a neuron that never fires is never core"


def test_the_sentence_core_is_the_most_frequent() -> None:
    usage = Usage.none(5)
    usage.add(torch.tensor([[3.0, 2.0, 0, 0, 1.0], [3.0, 0, 2.0, 0, 1.0], [0, 3.0, 2.0, 0, 1.0]]), 0.67, "abs")
    # each of 0, 1, 2 twice: by the sum of scores 6, 5, 4; neurons 3 and 4 never
    assert usage.ranking().tolist() == [0, 1, 2]
    assert usage.core(0.4).tolist() == [0, 1]
    assert usage.core(0.9).tolist() == [0, 1, 2], "fewer were ever core than keep allows"
    assert usage.core(1.0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("score", ["abs", "signed"])
def test_sets_do_not_depend_on_the_order_or_repetition_of_tokens(score: str) -> None:
    h = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))

    def core(h: Tensor, keep: float = 0.4) -> list[int]:
        usage = Usage.none(h.shape[1])
        usage.add(h, 0.2, score)
        return list(usage.core(keep).tolist())

    wanted = core(h)
    assert len(wanted) == 20
    assert core(h[torch.randperm(30, generator=torch.Generator().manual_seed(1))]) == wanted
    assert core(h.repeat(2, 1)) == wanted
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert sorted(order[core(h[:, order])].tolist()) == wanted, "permuting neurons permutes the set"
    nested = [set(core(h, keep)) for keep in (0.1, 0.2, 0.5, 0.8)]
    assert all(a < b for a, b in itertools.pairwise(nested))
    one = core(h[:1], 0.99)
    assert len(one) == int(0.2 * len(h[0] if score == "abs" else h[0][h[0] > 0]))


def test_alpha_one_for_a_single_token_is_all_that_fire() -> None:
    model, prompt = opt(), ids(1)
    with capture(model) as seen:
        model(prompt)
    cores = core_neurons(model, prompt, keep=0.99, alpha=1.0, layers=ALL)
    for name, kept in cores.items():
        assert kept.tolist() == (seen[name].flatten() > 0).nonzero().flatten().tolist()


def test_padding_is_not_counted_and_texts_need_a_tokenizer() -> None:
    model, prompt = llama(), ids(8)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    mask = (torch.arange(12) >= 4).long()[None]
    with capture(model) as seen:
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    inputs = {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cores = core_neurons(model, inputs, layers=ALL)
    for site in find_sites(model):
        usage = Usage.none(site.width)
        usage.add(seen[site.name][0, 4:], 0.2, "abs")
        assert torch.equal(cores[site.name], usage.core(0.4))
    with pytest.raises(ValueError, match="tokenizer"):
        core_neurons(model, "ba do ki")
    text = core_neurons(model, " ".join(sorted(words().get_vocab())), tokenizer=words(), layers=ALL)
    assert [len(kept) for kept in text.values()] == [int(0.4 * 48)] * 2


# --- leaving neurons out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_gathered_is_masked(name: str) -> None:
    model, prompt = family(name), ids()
    cores = core_neurons(model, prompt, keep=0.4, layers=ALL)
    with masked(model, cores), torch.no_grad():
        wanted = model(prompt).logits
    changes = restrict(model, cores)
    with torch.no_grad():
        torch.testing.assert_close(changes.model(prompt).logits, wanted, rtol=1e-5, atol=1e-6)
        with only(model, cores):
            torch.testing.assert_close(model(prompt).logits, wanted, rtol=1e-5, atol=1e-6)
        assert (model(prompt).logits - wanted).abs().max() > 1e-4, "leaving out changes nothing in this test"
    assert [site.width for site in find_sites(changes.model)] == [len(kept) for kept in cores.values()]


def test_all_neurons_kept_is_the_dense_model() -> None:
    for model in (llama(), opt()):
        prompt, rest = ids(10), ids(5, seed=1)
        wanted = continued(model, prompt, rest)
        with CoreInfer(model, 1.0, layers=ALL):
            found = continued(model, prompt, rest)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_rectified_net_is_exact_where_no_firing_neuron_is_left_out() -> None:
    model, prompt = opt(), ids(10)
    cores = core_neurons(model, prompt, keep=0.999, alpha=1.0, layers=ALL)
    assert any(len(kept) < 64 for kept in cores.values()), "no neuron is left out"
    with capture(model) as seen:
        wanted = model(prompt).logits
    fired = {name: set((h.flatten(0, -2) > 0).any(0).nonzero().flatten().tolist()) for name, h in seen.items()}
    whole = {name: torch.tensor(sorted(found)) for name, found in fired.items()}
    with only(model, whole):
        torch.testing.assert_close(model(prompt).logits, wanted, rtol=0, atol=1e-6)


def test_the_share_of_weights_that_is_left() -> None:
    model = llama()
    changes = restrict(model, core_neurons(model, ids(), keep=0.4, layers=[1]))
    mlp = changes.model.model.layers[1].mlp  # type: ignore[union-attr,index]
    assert sum(p.numel() for p in mlp.parameters()) == 3 * 32 * int(0.4 * 48)
    assert changes.changed == tuple(f"model.layers.1.mlp.{part}_proj" for part in ("up", "gate", "down"))
    assert changes.left["model.layers.0.mlp.up_proj"] == "a layer that was to stay whole"
    assert "model.embed_tokens" in changes.left


def test_a_plain_network_without_cache() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(6, 8)
    cores = core_neurons(model, x, keep=0.5)
    with masked(model, cores):
        wanted = model(x)
    torch.testing.assert_close(restrict(model, cores).model(x), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="keeps no cache"):
        CoreInfer(model)


# --- generation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_the_prompt_is_dense_and_the_answer_sparse(name: str) -> None:
    model, prompt, rest = family(name), ids(), ids(4, seed=1)
    before = dict(model.named_parameters())
    with torch.no_grad():
        dense = model(prompt, use_cache=True)
    cores = core_neurons(model, prompt, layers=ALL)
    with masked(model, cores):
        wanted = model(rest, past_key_values=copy.deepcopy(dense.past_key_values)).logits
    with CoreInfer(model, layers=ALL) as core, torch.no_grad():
        read = model(prompt, use_cache=True)
        assert torch.equal(read.logits, dense.logits)
        for ours, theirs in zip(read.past_key_values.layers, dense.past_key_values.layers, strict=True):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        found = model(rest, past_key_values=read.past_key_values).logits
        assert all(torch.equal(core.cores[key], cores[key]) for key in cores)
        other = ids(seed=5)
        model(other, use_cache=True)  # a new prompt gets its own sets
        again = core_neurons(copy.deepcopy(llama()), other, layers=ALL) if name == "llama" else None
        assert again is None or all(torch.equal(core.cores[key], again[key]) for key in again)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before), "the model's own parameters are not back"
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, dense.logits)


def test_generate_one_and_many() -> None:
    model = llama()
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompt = ids(8, rows=3)
    dense = model.generate(prompt, **settings)
    with CoreInfer(model, 0.2, layers=ALL) as core:
        sparse = model.generate(prompt, **settings)
        assert {len(kept) for kept in core.cores.values()} == {int(0.2 * 48)}
        beams = model.generate(prompt[:1], num_beams=2, **settings)
    assert sparse.shape == dense.shape
    assert not torch.equal(sparse, dense)
    assert beams.shape == (1, 18)
    assert torch.equal(model.generate(prompt, **settings), dense), "the dense model is not back"


def test_batches_share_one_set_by_frequency_or_union() -> None:
    model, prompt = llama(), ids(8, rows=3)
    with CoreInfer(model, 0.3, layers=ALL) as core:
        continued(model, prompt, ids(2, rows=3))
        pooled = dict(core.cores)
    assert all(torch.equal(pooled[k], v) for k, v in core_neurons(model, prompt, keep=0.3, layers=ALL).items())
    with CoreInfer(model, 0.3, layers=ALL, batch="union") as core:
        continued(model, prompt, ids(2, rows=3))
        union = dict(core.cores)
    each = [core_neurons(model, row[None], keep=0.3, layers=ALL) for row in prompt]
    for name, kept in union.items():
        assert torch.equal(kept, torch.cat([cores[name] for cores in each]).unique())


def test_left_padding_does_not_count_in_generation() -> None:
    model, prompt = llama(), ids(8)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    mask = (torch.arange(12) >= 4).long()[None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with warnings.catch_warnings(), CoreInfer(model, layers=ALL) as core:
        warnings.simplefilter("ignore")
        model(padded, attention_mask=mask, position_ids=places, use_cache=True)
        assert core.cores
    wanted = core_neurons(model, {"input_ids": padded, "attention_mask": mask, "position_ids": places}, layers=ALL)
    assert all(torch.equal(core.cores[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_refreshed_sets_are_those_of_the_tokens_since(name: str) -> None:
    model, prompt, rest = family(name), ids(12), ids(6, seed=3)
    with CoreInfer(model, layers=ALL, refresh_every=4) as core, torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        first = dict(core.cores)
        read: dict[str, list[Tensor]] = {}
        for place in range(5):
            if place < 4:
                assert all(torch.equal(core.cores[key], first[key]) for key in first)
            with _dense_activations(model, core) as seen:
                model(rest[:, place : place + 1], past_key_values=cache)
            for key, h in seen.items() if place < 4 else ():
                read.setdefault(key, []).append(h)
        second = core.cores
    with capture(model) as prompted:
        model(prompt)
    for site in find_sites(model):
        usage = Usage.none(site.width)
        usage.add(prompted[site.name].flatten(0, -2), 0.2, "abs")
        usage.fade()
        usage.add(torch.cat(read[site.name]), 0.2, "abs")
        assert torch.equal(second[site.name], usage.core(0.4))
    assert any(not torch.equal(first[key], second[key]) for key in first)


@contextmanager
def _dense_activations(model: nn.Module, core: CoreInfer) -> Iterator[dict[str, Tensor]]:
    """What the dense layers would make of the inputs that they get in the sparse model."""
    plain = family(type(model).__name__.lower().removesuffix("forcausallm").removesuffix("lmheadmodel"))
    inputs: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in find_sites(plain):
            owner = next(iter(site.reads.values())).name.rpartition(".")[0]
            module = model.get_submodule(owner)
            keep = lambda _, args, n=site.name: inputs.__setitem__(n, args[0])  # noqa: E731
            stack.callback(module.register_forward_pre_hook(keep).remove)
        yield seen
    for site in find_sites(plain):
        with capture(plain, [site]) as own:
            block = plain.get_submodule(site.name)
            if hasattr(block, "fc1"):  # OPT has no module of its own for the MLP
                own[site.name] = block.activation_fn(block.fc1(inputs[site.name]))
            else:
                block(inputs[site.name])
        seen[site.name] = own[site.name].flatten(0, -2)


def test_two_models_at_once_and_one_only_once() -> None:
    a, b, prompt = llama(0), llama(1), ids()
    with CoreInfer(a, layers=ALL) as first, CoreInfer(b, 0.5, layers=ALL) as second:
        continued(a, prompt, ids(1))
        continued(b, prompt, ids(1))
        assert {len(kept) for kept in first.cores.values()} == {19}
        assert {len(kept) for kept in second.cores.values()} == {24}
        with pytest.raises(ValueError, match="leave that first"), CoreInfer(a):
            pass


def test_restored_after_an_exception() -> None:
    model, prompt = llama(), ids()
    wanted = model(prompt).logits
    with pytest.raises(IndexError), CoreInfer(model, layers=ALL):
        continued(model, prompt, torch.full((1, 1), 10_000))  # no such token
    assert torch.equal(model(prompt).logits, wanted)
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    with CoreInfer(model, layers=ALL):  # and may be entered again
        continued(model, prompt, ids(1))


def test_half_precision() -> None:
    model, prompt = llama().bfloat16(), ids()
    with CoreInfer(model, layers=ALL) as core:
        out = continued(model, prompt, ids(3))
        assert out.dtype == torch.bfloat16
        assert model.model.layers[0].mlp.up_proj.weight.shape == (19, 32)
        assert len(core.cores) == 2


# --- similarity-guided -----------------------------------------------------------------------------------------


def parted() -> Any:
    """A model to which the words from 30 on are of another kind than those before."""
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[30:] += torch.randn(32, generator=torch.Generator().manual_seed(0)) / 2
        model.model.embed_tokens.weight[:30] += torch.randn(32, generator=torch.Generator().manual_seed(1)) / 2
    return model


def groups(count: int = 4) -> list[Tensor]:
    """Texts of two kinds: the words of one are not the words of the other."""
    drawn = [torch.randint(0, 20, (1, 12), generator=torch.Generator().manual_seed(s)) for s in range(2 * count)]
    return [text + 3 if number < count else text + 35 for number, text in enumerate(drawn)]


def test_one_cluster_is_one_global_set() -> None:
    model, texts = llama(), groups()
    clusters = CoreClusters.fit(model, texts, k=1, layers=ALL)
    pooled = {site.name: Usage.none(site.width) for site in find_sites(model)}
    for text in texts:
        with capture(model) as seen:
            model(text)
        for name, h in seen.items():
            pooled[name].add(h.flatten(0, -2), 0.4, "abs")
    with CoreInfer(model, layers=ALL, mode="similarity", clusters=clusters) as core:
        continued(model, ids(1), ids(1))  # one token will do
    assert all(torch.equal(core.cores[name], usage.core(0.4)) for name, usage in pooled.items())


def test_a_member_finds_its_own_cluster_and_kinds_part() -> None:
    model, texts = parted(), groups()
    clusters = CoreClusters.fit(model, texts, k=2, layers=ALL)
    assert len(set(clusters.labels[:4].tolist())) == len(set(clusters.labels[4:].tolist())) == 1
    assert clusters.labels[0] != clusters.labels[4]
    [deep] = clusters.probes(model)
    sites = [site.name for site in find_sites(model)]
    with CoreInfer(model, layers=ALL, mode="similarity", clusters=clusters) as core:
        for text, label in zip(texts, clusters.labels.tolist(), strict=True):
            continued(model, text, ids(1))
            wanted = {name: clusters.core(label, name, 0.4) for name in sites}
            assert all(torch.equal(core.cores[name], wanted[name]) for name in wanted)
    assert deep.site.name == "model.layers.1.mlp"
    again = CoreClusters(**clusters.state_dict())
    assert torch.equal(again.core(0, deep.site.name, 0.4), clusters.core(0, deep.site.name, 0.4))


def test_the_number_of_clusters_is_found() -> None:
    clusters = CoreClusters.fit(llama(), groups(6), layers=ALL)
    assert 4 <= len(clusters.centres) <= 10
    assert CoreClusters.fit(llama(), groups(1), layers=ALL).labels.max() <= 1, "no more groups than texts"


# --- the two observations ---------------------------------------------------------------------------------------


def test_stability_of_a_text_that_repeats_itself() -> None:
    model = opt()
    curve = stability_curve(model, ids(40), every=8, layers=ALL)
    assert curve.tokens.tolist() == [8, 16, 24, 32, 40]
    assert curve.to_whole.shape == (3, 5)
    assert (curve.to_whole[:, -1] == 1).all()
    beginning = core_neurons(model, ids(40)[:, :16], layers=ALL)
    whole = core_neurons(model, ids(40), layers=ALL)
    name = curve.layers[1]
    both = len(set(beginning[name].tolist()) & set(whole[name].tolist()))
    assert curve.to_whole[1, 1].item() == pytest.approx(both / (len(beginning[name]) + len(whole[name]) - both))
    with pytest.raises(ValueError, match="at least that many"):
        stability_curve(model, ids(4), every=8)


def test_texts_of_like_meaning_and_like_neurons() -> None:
    model, texts = parted(), groups()
    kinds = ["a"] * 4 + ["b"] * 4
    same = torch.tensor([[float(a == b) for a in kinds] for b in kinds])
    report = semantic_similarity_report(model, texts, similarity=same, topics=kinds, layers=ALL)
    assert report.within is not None
    assert report.between is not None
    assert (report.within > report.between).all()
    assert (report.pearson > 0.5).all()
    assert torch.equal(report.overlap, report.overlap.mT)
    with pytest.raises(ValueError, match="meaning of token ids"):
        semantic_similarity_report(model, texts)
    with pytest.raises(ValueError, match="3 or more"):
        semantic_similarity_report(model, texts[:2], similarity=same)


# --- a real model -------------------------------------------------------------------------------------------------


def test_a_real_model() -> None:
    loaded = models.load("smollm2")
    net, tokenizer = loaded.module(), loaded.tokenizer
    text = "The river rose in the night, and by morning the lower fields and the road to the mill stood under water. "
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    with CoreInfer(net, layers=slice(2, 29)) as core:
        out = net.generate(prompt, max_new_tokens=6, do_sample=False)
    assert out.shape[1] == prompt.shape[1] + 6
    assert [len(kept) for kept in core.cores.values()] == [int(0.4 * 1536)] * 27
    assert "lm_head" in core.left
    assert all(site.width == 1536 for site in find_sites(net))
    report = semantic_similarity_report(
        net,
        ["A man is playing a guitar.", "Someone plays a musical instrument.", "The stock market fell sharply today."],
        similarity=torch.tensor([[1.0, 0.7, 0.0], [0.7, 1.0, 0.1], [0.0, 0.1, 1.0]]),
        tokenizer=tokenizer,
    )
    assert report.overlap.shape == (19, 3, 3)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": 0.01}, "keeps none"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"score": "up"}, "score='up'"),
        ({"layers": [5]}, "layers 0 to 1"),
        ({"layers": []}, "layers 0 to 1"),
        ({"layers": slice(7, 9)}, "layers 0 to 1"),
        ({"mode": "other"}, "mode='other'"),
        ({"batch": "other"}, "batch='other'"),
        ({"mode": "similarity"}, "CoreClusters.fit"),
        ({"refresh_every": -1}, "refresh_every=-1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CoreInfer(llama(), **settings)


def test_prompts_that_say_nothing() -> None:
    model = llama()
    with CoreInfer(model, layers=ALL) as core:
        with pytest.raises(ValueError, match="empty prompt"):
            model(torch.zeros(1, 0, dtype=torch.long), use_cache=True)
        with pytest.warns(UserWarning, match="one token"):
            out = continued(model, ids(1), ids(2))
        assert not core.cores
    assert torch.equal(out, continued(model, ids(1), ids(2)))
    cache = model(ids(), use_cache=True).past_key_values
    with pytest.warns(UserWarning, match="before the block"), CoreInfer(model, layers=ALL):
        model(ids(1), past_key_values=cache)
    with pytest.raises(ValueError, match="empty"):
        core_neurons(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.warns(UserWarning, match="no pass used a cache"), CoreInfer(model, layers=ALL):
        model(ids())


def test_models_that_cannot_leave_neurons_out() -> None:
    bitnet = AutoModelForCausalLM.from_config(BitNetConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2))
    with pytest.raises(ModelError, match="normalisation"):
        CoreInfer(bitnet)
    mixtral = AutoModelForCausalLM.from_config(
        MixtralConfig(**SHAPE, intermediate_size=64, num_key_value_heads=2, num_local_experts=2)
    )
    with pytest.raises(ModelError, match="no layer can leave"):
        CoreInfer(mixtral)
    model = llama()
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    ones = torch.ones(len(weight), 1)
    pack(model, {"model.layers.1.mlp.up_proj": Affine.of(torch.ones_like(weight).long(), 4, ones, ones)})
    with pytest.raises(ValueError, match="packed"):
        CoreInfer(model)
    broken = llama()
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        core_neurons(broken, ids(), layers=ALL)


def test_sets_that_do_not_fit() -> None:
    model = llama()
    with pytest.raises(KeyError, match="no site"):
        restrict(model, {"nowhere": torch.tensor([1])})
    for bad in ([], [48], [-1], [3, 3]):
        with pytest.raises(ValueError, match="neurons 0 to 47"):
            restrict(model, {"model.layers.0.mlp": torch.tensor(bad, dtype=torch.long)})
