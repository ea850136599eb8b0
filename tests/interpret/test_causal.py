"""The causal check: the fast way equals the plain way, effects are the logits', the error rate holds."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torch import nn

from neuropil.errors import ModelError, NeuropilError
from neuropil.interpret.causal import CausalCheck, neutral_prompts
from neuropil.interpret.controls import MatchedTokens
from neuropil.interpret.replay import Replay, choose_way
from neuropil.interpret.verdict import beyond_controls, moderated_t, step_up
from neuropil.models import load
from neuropil.neurons import clamp, find_sites

PROMPTS = [[5, 17, 3, 90, 41], [8, 2, 77, 30], [60, 11, 12, 13, 14, 15]]
SMALL = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt2": lambda: hf.GPT2Config(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=32),
    "neox": lambda: hf.GPTNeoXConfig(**SMALL, intermediate_size=64),  # attention and MLP in parallel
    "gemma2": lambda: hf.Gemma2Config(  # norms after the MLP, sliding windows, capped logits
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=8
    ),
    "phi3": lambda: hf.Phi3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0),
    "mixtral": lambda: hf.MixtralConfig(
        **SMALL, intermediate_size=40, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    ),
    "bert": lambda: hf.BertConfig(**SMALL, intermediate_size=48, is_decoder=False),
}


@cache
def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    auto = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():  # the usual initialisation is so small that all effects are the same
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def labels(width: int, seed: int = 0, vocabulary: int = 120) -> dict[str, list]:
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (width, 2))
    return {"label_token": tokens[:, 0].tolist(), "label_tokens": tokens.tolist()}


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


# -- running from a block upwards ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "phi3"])
def test_replay_equals_the_whole_forward(name: str) -> None:
    model = tiny(name)
    sites = find_sites(model)
    replay = Replay(model, sites, PROMPTS[0])
    for site in sites:
        neurons = torch.tensor([0, 3, 3, site.width - 1])
        values = torch.tensor([2.0, -2.0, 4.0, 0.5])
        plain = replay.run(site, neurons, values, "plain")
        for way in ("replay", "rows"):
            torch.testing.assert_close(replay.run(site, neurons, values, way), plain, rtol=1e-4, atol=1e-4)
        assert choose_way(replay, site, neurons, values) == "replay"
        assert (plain - replay.clean).abs().max() > 1e-3  # the clamps did something


def test_plain_way_equals_a_hook_written_by_hand() -> None:
    model = tiny("llama")
    replay = Replay(model, find_sites(model), PROMPTS[0])
    down = model.model.layers[1].mlp.down_proj
    neurons, values = torch.tensor([7, 40]), torch.tensor([3.0, -1.5])

    def set_last(_: nn.Module, args: tuple) -> tuple:
        h = args[0].clone()
        h[torch.arange(2), -1, neurons] = values
        return (h,)

    handle = down.register_forward_pre_hook(set_last)
    with torch.no_grad():
        ids = torch.tensor([PROMPTS[0]]).expand(2, -1)
        by_hand = model.model(ids).last_hidden_state[:, -1]
    handle.remove()
    for way in ("replay", "rows", "plain"):
        found = replay.run(replay.sites[1], neurons, values, way)
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)


def test_last_block_has_the_closed_form() -> None:
    """logits = W_U (g * (x + dv W_down[:, n]) / rms(x + dv W_down[:, n])), dv = v - h_n."""
    model = tiny("llama")
    last = model.model.layers[-1]
    seen: dict[str, torch.Tensor] = {}
    handle = last.register_forward_hook(lambda _, __, out: seen.update(x=out[0, -1]))
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    handle.remove()
    replay = Replay(model, find_sites(model), PROMPTS[0])
    site, n, v = replay.sites[-1], 11, 2.5
    dv = v - replay.activations[site.name][n]
    x = seen["x"] + dv * last.mlp.down_proj.weight[:, n]
    norm = model.model.norm
    expected = norm.weight * x / torch.sqrt(x.pow(2).mean() + norm.variance_epsilon)
    found = replay.run(site, torch.tensor([n]), torch.tensor([v]))[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(site=st.integers(0, 2), n=st.integers(0, 47))
def test_clamping_to_its_own_value_changes_nothing(site: int, n: int) -> None:
    model = tiny("llama")
    replay = Replay(model, find_sites(model), PROMPTS[1])
    own = replay.activations[replay.sites[site].name][n : n + 1]
    found = replay.run(replay.sites[site], torch.tensor([n]), own)[0]
    torch.testing.assert_close(found, replay.clean, rtol=1e-5, atol=1e-5)


def test_experts_are_run_row_by_row_equal() -> None:
    model = tiny("mixtral")
    replay = Replay(model, find_sites(model), PROMPTS[0])
    routed = [s for s in replay.sites if s.name in replay.activations]
    assert 0 < len(routed) < len(replay.sites)
    for site in (routed[0], routed[-1]):
        neurons, values = torch.tensor([1, 1, 20]), torch.tensor([5.0, -5.0, 3.0])
        single = replay.run(site, neurons, values, "plain")
        torch.testing.assert_close(replay.run(site, neurons, values, "rows"), single, rtol=1e-4, atol=1e-4)
        assert choose_way(replay, site, neurons, values) == "rows"
        assert (single - replay.clean).abs().max() > 1e-3
    idle = next(s for s in replay.sites if s.name not in replay.activations)
    for way in ("rows", "plain"):
        found = replay.run(idle, torch.tensor([1]), torch.tensor([5.0]), way)[0]
        torch.testing.assert_close(found, replay.clean, rtol=1e-5, atol=1e-5)


def test_a_model_without_cache_is_run_the_plain_way() -> None:
    check = CausalCheck(load(tiny("bert")), PROMPTS)
    assert list(check.ways) == ["plain"]
    site = check.model.sites[1]
    table = check.columns(site, labels(site.width))
    assert np.isfinite(table["effect"]).all()
    assert np.ptp(table["effect"]) > 1e-3


def test_the_model_is_as_before_also_after_an_exception() -> None:
    model = tiny("gpt2")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = {name: set(m.__dict__) for name, m in model.named_modules()}
    ids = torch.tensor([PROMPTS[0]])
    logits = model(ids).logits
    replay = Replay(model, find_sites(model), PROMPTS[0])
    with pytest.raises(IndexError):
        replay.run(replay.sites[1], torch.tensor([10_000]), torch.tensor([1.0]))
    replay.run(replay.sites[1], torch.tensor([1]), torch.tensor([1.0]))
    assert torch.equal(model(ids).logits, logits)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- effects ---------------------------------------------------------------------------------------------


def test_effects_are_those_of_the_whole_model_s_logits() -> None:
    model = tiny("llama")
    check = CausalCheck(load(model), PROMPTS, value=2.0, rows=32)
    site, given_labels = check.model.sites[1], labels(48)
    table = check.columns(site, given_labels)
    for n in (0, 5, 47):
        tokens = given_labels["label_tokens"][n]
        changes = {+1: [], -1: [], 0: []}
        for ids in PROMPTS:
            prefix = torch.tensor([ids[:-1]])
            for sign, found in changes.items():
                cache = model(prefix, use_cache=True).past_key_values
                held = {f"1:{n}": 2.0 * sign} if sign else {}
                with torch.no_grad(), clamp(model, held):
                    logits = model(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1]
                found.append(centred(logits)[tokens].mean().item())
        up, down, clean = (np.array(changes[sign]) for sign in (1, -1, 0))
        half = (up - down) / 2
        assert table["effect"][n] == pytest.approx(half.mean(), abs=1e-4)
        assert table["effect_se"][n] == pytest.approx(half.std(ddof=1) / np.sqrt(3), abs=1e-4)
        assert table["effect_up"][n] == pytest.approx((up - clean).mean(), abs=1e-4)
        assert table["effect_down"][n] == pytest.approx((down - clean).mean(), abs=1e-4)


def test_natural_values_are_the_largest_activations_but_the_first_token_s() -> None:
    model = tiny("llama")
    check = CausalCheck(load(model), PROMPTS)
    site = check.model.sites[2]
    table = check.columns(site, labels(48))
    seen: list[torch.Tensor] = []
    handle = model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(a[0][0, 1:]))
    with torch.no_grad():
        for ids in PROMPTS:
            model(torch.tensor([ids]))
    handle.remove()
    largest = torch.cat(seen).abs().amax(0)
    expected = largest.clamp(min=0.1 * largest.median().item())
    np.testing.assert_allclose(table["clamp_value"], expected.numpy(), rtol=1e-4)


def test_up_clamps_go_through_the_gate() -> None:
    model = tiny("llama")
    check = CausalCheck(load(model), PROMPTS, clamp="up", value=30.0)
    site = check.model.sites[0]
    replay, mlp = check._replays[0], model.model.layers[0].mlp
    inputs: list[torch.Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, a: inputs.append(a[0][0, -1]))
    with torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
        gate = nn.functional.silu(mlp.gate_proj(inputs[0]))
    handle.remove()
    torch.testing.assert_close(replay.all_up(site, 30.0), 30 * gate, rtol=1e-4, atol=1e-4)
    table = check.columns(site, labels(48))
    assert np.isfinite(table["effect"]).all()
    assert table["clamp_value"].max() > 0


def test_a_site_s_columns_depend_on_nothing_done_before() -> None:
    steps: list[tuple[int, int]] = []
    first = CausalCheck(load(tiny("gpt2")), PROMPTS)
    sites = first.model.sites
    first.columns(sites[0], labels(sites[0].width, 1))
    a = first.columns(sites[2], labels(sites[2].width, 2), on_step=lambda *s: steps.append(s))
    b = CausalCheck(load(tiny("gpt2")), PROMPTS).columns(sites[2], labels(sites[2].width, 2))
    small = CausalCheck(load(tiny("gpt2")), PROMPTS, rows=20).columns(sites[2], labels(sites[2].width, 2))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_allclose(a["effect"], small["effect"], rtol=1e-4, atol=1e-5)
    assert steps[-1] == (2 * 3 * sites[2].width,) * 2
    assert json.loads(json.dumps(first.settings)) == first.settings


# -- verdicts --------------------------------------------------------------------------------------------


@cache
def planted() -> tuple[CausalCheck, dict, np.ndarray]:
    """In the last block neuron n writes its label's head row, minus that row, or neither (n mod 3)."""
    torch.manual_seed(1)
    config = hf.LlamaConfig(
        vocab_size=600, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=300
    )
    model = hf.LlamaForCausalLM(config).eval()
    tokens = np.random.default_rng(3).permutation(600)[:300]
    sign = torch.tensor([1.0, -1.0, 0.0]).repeat(100)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.copy_((model.lm_head.weight[tokens] * sign[:, None]).T)
        model.model.layers[1].mlp.down_proj.weight += 0.003 * torch.randn(64, 300)
    prompts = [np.random.default_rng(i).integers(0, 600, 6).tolist() for i in range(3)]
    check = CausalCheck(load(model), prompts)
    given_labels = {"label_token": tokens.tolist(), "label_tokens": [[int(t)] for t in tokens]}
    return check, check.columns(check.model.sites[1], given_labels), sign.numpy()


def test_planted_neurons_get_the_verdict_they_were_given() -> None:
    _, table, sign = planted()
    verdict = np.array(table["verdict"])
    assert (verdict[sign > 0] == "promotes").mean() > 0.97
    assert (verdict[sign < 0] == "suppresses").mean() > 0.97
    assert (verdict[sign == 0] == "no effect").mean() > 0.9
    np.testing.assert_array_equal(table["confirmed"], verdict != "no effect")


def test_random_labels_are_seldom_confirmed() -> None:
    check, table, _ = planted()
    assert table["shuffled_confirmed"].mean() < 0.06  # the limit is set where two thirds of the labels are true
    site, confirmed = check.model.sites[1], []
    for seed in range(4):  # no label is true: hardly any may pass
        tokens = np.random.default_rng(seed).integers(0, 600, site.width)
        none_true = {"label_token": tokens.tolist(), "label_tokens": [[] for _ in tokens]}
        confirmed.append(check.columns(site, none_true)["confirmed"].mean())
    assert np.mean(confirmed) < 0.01


def test_a_neuron_without_label_has_no_effect() -> None:
    check = CausalCheck(load(tiny("gpt2")), PROMPTS)
    site = check.model.sites[0]
    given_labels = labels(site.width)
    given_labels["label_token"][3], given_labels["label_tokens"][3] = -1, []
    table = check.columns(site, given_labels)
    assert np.isnan(table["effect"][3])
    assert table["verdict"][3] == "no effect"
    assert not table["confirmed"][3]
    assert np.isfinite(np.delete(table["effect"], 3)).all()


@pytest.mark.parametrize("prior", [4.0, 20.0])
def test_moderated_t_is_calibrated_and_stronger_than_student_s(prior: float) -> None:
    rng = np.random.default_rng(0)
    scale = np.sqrt(prior / rng.chisquare(prior, 40_000))
    x = rng.normal(size=(40_000, 3)) * scale[:, None]
    p, found = moderated_t(x)
    assert found == pytest.approx(prior, rel=0.35)
    for level in (0.001, 0.01, 0.05):
        assert (p < level).mean() < level + 3 * np.sqrt(level / 40_000)
    shifted = x + 3 * scale[:, None]
    assert (moderated_t(shifted)[0] < 0.01).mean() > 1.5 * (stats.ttest_1samp(shifted, 0, axis=1).pvalue < 0.01).mean()


def test_moderated_t_needs_two_prompts() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        moderated_t(np.ones((5, 1)))


def test_beyond_controls_is_a_prediction_interval() -> None:
    rng = np.random.default_rng(0)
    p, spread = beyond_controls(rng.normal(size=20_000), rng.normal(size=(20_000, 24)))
    assert (p < 0.01).mean() == pytest.approx(0.01, abs=0.003)
    assert spread.mean() == pytest.approx(1, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(1e-6, 1)), st.floats(0.01, 0.3))
def test_step_up_is_the_rule_of_benjamini_and_hochberg(p: np.ndarray, rate: float) -> None:
    adjusted = stats.false_discovery_control(p)
    clear = np.abs(adjusted - rate) > 1e-9
    np.testing.assert_array_equal((p <= step_up(p, rate))[clear], (adjusted <= rate)[clear])


def test_controls_are_alike_and_of_other_words() -> None:
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), 5)) for _ in range(5000)]
    norms = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    match = MatchedTokens(norms, texts)
    tokens, counts = torch.randint(0, 5000, (300, 3)), torch.randint(1, 4, (300,))
    controls = match.draw(tokens, counts, k=9, seed=4)
    for row, count, drawn in zip(tokens.tolist(), counts.tolist(), controls.tolist(), strict=True):
        assert not {texts[t][:3] for t in row[:count]} & {texts[c][:3] for c in drawn}
        for j, c in enumerate(drawn):
            assert abs(c - row[j % count]) <= 501
        assert len(set(drawn)) == 9
    first = norms[tokens[:, 0]][:, None]
    off = (norms[controls[:, :1]] / first).log().abs().mean()
    assert off < 0.2 * (norms[torch.randint(0, 5000, (300, 1))] / first).log().abs().mean()
    assert torch.equal(controls, match.draw(tokens, counts, k=9, seed=4))


# -- what a user may give wrongly ------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model = load(tiny("llama"))
    with pytest.raises(ModelError, match="head"):
        CausalCheck(load(tiny("llama").model), PROMPTS)
    with pytest.raises(ModelError, match="head"):
        Replay(tiny("llama").model, find_sites(tiny("llama").model), PROMPTS[0])
    with pytest.raises(ModelError, match="tokenizer"):
        CausalCheck(model, ["The dog ran after the"])
    with pytest.raises(NeuropilError, match="at least 2"):
        CausalCheck(model, [[1, 2], [3]])
    with pytest.raises(NeuropilError, match="at least 2 prompts"):
        CausalCheck(model, PROMPTS[:1])
    with pytest.raises(ValueError, match="gate"):
        CausalCheck(model, PROMPTS, clamp="gate")
    with pytest.raises(ValueError, match="48 neurons"):
        CausalCheck(model, PROMPTS).columns(model.sites[0], labels(40))


def test_neutral_prompts_are_short_and_different() -> None:
    prompts = neutral_prompts()
    assert len(set(prompts)) == len(prompts) == 64
    assert all(4 <= len(p.split()) <= 12 and p == p.strip() and p[-1].isalpha() for p in prompts)
    assert len({p.split()[-2:][0] for p in prompts}) > 20


# -- a real model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> CausalCheck:
    return CausalCheck(load("smollm2"))


def test_on_a_real_model_replay_equals_the_plain_way(smollm2: CausalCheck) -> None:
    assert list(smollm2.ways) == ["replay"]
    replay = smollm2._replays[0]
    rng = torch.Generator().manual_seed(0)
    for number in (0, 9, 19, 28, 29):
        site = smollm2.model.sites[number]
        neurons = torch.randint(site.width, (4,), generator=rng)
        values = smollm2._natural(site)[neurons] * torch.tensor([1.0, -1.0, 1.0, -1.0])
        plain = replay.run(site, neurons, values, "plain")
        found = replay.run(site, neurons, values, "replay")
        assert (found - plain).abs().max() < 1e-4 * plain.abs().max()


def test_values_do_not_depend_on_the_number_of_threads(smollm2: CausalCheck) -> None:
    site, threads = smollm2.model.sites[27], torch.get_num_threads()
    neurons, values = torch.arange(512), torch.linspace(-5, 5, 512)
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            replay = Replay(smollm2.model.module(), smollm2.model.sites, smollm2.ids[0])
            found.append(replay.run(site, neurons, values))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_the_pet_neuron_of_a_real_model_promotes_dogs(smollm2: CausalCheck) -> None:
    site = smollm2.model.sites[29]
    dog = smollm2.model.tokens().index(" dog")
    tokens = np.random.default_rng(0).integers(1000, 40_000, site.width)
    tokens[808] = dog
    table = smollm2.columns(site, {"label_token": tokens.tolist(), "label_tokens": [[int(t)] for t in tokens]})
    assert table["verdict"][808] == "promotes"
    assert table["effect"][808] > 10 * table["effect_se"][808]
    assert np.mean(table["confirmed"]) < 0.02  # all other labels were drawn at random
