"""TARS: planted vectors are found, edits are exact and exactly undone, and a real model loses the concept."""

import copy
import statistics

import pytest
import torch
from tiny_models import llama, words
from transformers import GPT2Config, GPT2LMHeadModel

from neuropil.errors import MissingAsset, ModelError
from neuropil.interpret.targeting import TargetingResult, applied, apply, revert, target
from neuropil.models import Model, load


def tiny() -> Model:
    return load(llama(), tokenizer=words())


def gpt2() -> Model:
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=200, n_positions=64)).eval()
    return load(net, tokenizer=words())


def found(model: Model, **settings: object) -> TargetingResult:
    return target(model, 7, **{"edits": 6, "rounds": 5, **settings})  # type: ignore[arg-type]


def state(model: Model) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.module().state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_finding_changes_nothing_and_is_deterministic(make) -> None:
    model = make()
    before = state(model)
    first, second = found(model), found(model)
    assert same(state(model), before)
    assert torch.equal(first.vector, second.vector)
    assert [(str(e.neuron), e.role) for e in first.edits] == [(str(e.neuron), e.role) for e in second.edits]
    assert not torch.equal(first.vector, found(model, seed=1).vector)


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_the_edits_are_the_most_similar_vectors_of_all(make) -> None:
    model = make()
    result = found(model, edits=10)
    cosines = {}
    for site in model.sites:
        for role in site.roles:
            values = torch.cosine_similarity(model.rows(site, role).double(), result.vector[None].double(), dim=1)
            cosines |= {(f"{site.number}:{i}", role): v for i, v in enumerate(values.tolist())}
    best = sorted(cosines, key=lambda key: -cosines[key])[:10]
    assert [(str(e.neuron), e.role) for e in result.edits] == best
    for edit in result.edits:
        assert edit.cosine == pytest.approx(cosines[str(edit.neuron), edit.role], abs=1e-6)


def test_refinement_raises_the_probability_at_constant_length() -> None:
    model = tiny()
    head = model.head().weight
    last = 0.0
    for rounds in (0, 3, 30):
        result = found(model, rounds=rounds, goal=2.0)
        assert result.rounds == rounds
        p = (result.vector @ head.T).softmax(0)[result.token].item()
        assert result.probability == pytest.approx(p, rel=1e-4)
        assert result.probability > last
        assert result.start == found(model, rounds=0).probability
        torch.testing.assert_close(result.vector.norm(), found(model, rounds=0).vector.norm())
        last = result.probability
    assert found(model, goal=1e-9).rounds == 0, "the goal is met at the start"


def test_centering_takes_out_what_all_text_shares() -> None:
    """Where one direction dominates every hidden state, it dominates the uncentred vector alone."""
    net = llama()
    with torch.no_grad():
        net.model.embed_tokens.weight[:, 0] += 1.0  # fifty times the spread of an embedding
    model = load(net, tokenizer=words())
    common, own = found(model, center=False, rounds=0), found(model, center=True, rounds=0)
    assert common.vector[0].abs() > 0.9 * common.vector.norm()
    # One of 32 directions holds a share of about 1 / sqrt(32) = 0.18 by chance.
    assert own.vector[0].abs() < 0.5 * own.vector.norm()


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_an_edited_vector_points_away_and_keeps_its_length(make) -> None:
    model = make()
    result = found(model)
    edited = load(apply(model.module(), result.edits), tokenizer=words())
    by_place = {(e.neuron.number, e.neuron.index, e.role) for e in result.edits}
    for edit in result.edits:
        row = edited.rows(edited.sites[edit.neuron.number], edit.role)[edit.neuron.index]
        assert torch.cosine_similarity(row, result.vector, dim=0).item() == pytest.approx(-1, abs=1e-5)
        torch.testing.assert_close(row.norm(), edit.before.norm())
    for site in model.sites:
        for role in site.roles:
            moved = (edited.rows(site, role) != model.rows(site, role)).any(1).nonzero().flatten().tolist()
            assert moved == sorted(i for n, i, r in by_place if (n, r) == (site.number, role))


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_undo_is_exact(make) -> None:
    model = make()
    net, before = model.module(), state(model)
    edits = found(model).edits
    with applied(net, edits) as inside:
        assert inside is net
        assert not same(net.state_dict(), before)
    assert same(net.state_dict(), before)
    with pytest.raises(KeyboardInterrupt), applied(net, edits):
        raise KeyboardInterrupt
    assert same(net.state_dict(), before)
    assert apply(net, edits, inplace=True) is net
    assert not same(net.state_dict(), before)
    assert same(revert(net, edits).state_dict(), before)


def test_a_copy_is_edited_unless_asked_otherwise() -> None:
    model = tiny()
    before = state(model)
    edited = apply(model.module(), found(model).edits)
    assert edited is not model.module()
    assert same(state(model), before)
    assert same(apply(model.module(), []).state_dict(), before)


def test_half_precision_is_undone_exactly_too() -> None:
    model = load(llama().to(torch.bfloat16), tokenizer=words())
    before = state(model)
    with applied(model.module(), found(model).edits):
        assert not same(state(model), before)
    assert same(state(model), before)


def test_edits_of_another_model_are_refused_untouched() -> None:
    model, other = tiny(), load(llama(seed=1), tokenizer=words())
    edits, before = found(model).edits, state(other)
    with pytest.raises(ModelError, match="not what they were"):
        apply(other.module(), edits, inplace=True)
    assert same(state(other), before)
    with pytest.raises(ModelError, match="no parameter"):
        apply(gpt2().module(), edits)
    with pytest.raises(ModelError, match="not what they were"):
        revert(model.module(), edits)
    with applied(model.module(), edits), pytest.raises(ModelError, match="not what they were"):
        apply(model.module(), edits, inplace=True)


def test_a_word_is_its_first_token() -> None:
    model = tiny()
    assert target(model, "babado", rounds=1).token == model.tokenizer.encode("babado")[0]


@pytest.mark.parametrize(
    ("concept", "settings", "message"),
    [
        ("  ", {}, "no token"),
        (200, {}, "0 to 199"),
        (-1, {}, "0 to 199"),
        (7, {"edits": 0}, "at least one edit"),
        (7, {"noise": 0.0}, "positive noise"),
        (7, {"roles": ()}, "expected up, gate or down"),
    ],
)
def test_bad_requests_are_refused(concept: str | int, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target(tiny(), concept, **settings)  # type: ignore[arg-type]


def test_a_model_without_tokenizer_is_refused() -> None:
    model = load(llama())
    with pytest.raises(ModelError, match="token id"):
        target(model, "dog")
    with pytest.raises(ModelError, match="no tokenizer"):
        target(model, 7)


CALLED_FOR = ["My pet barks at the postman; it is a", "The animal that barks and wags its tail is the"]
ELSEWHERE = [
    "The economy grew because the central bank",
    "She opened the door and saw that the",
    "In mathematics, a prime number is a",
    "The committee will meet on Tuesday to discuss",
]


def test_a_real_model_loses_the_concept() -> None:
    """SmolLM2: the concept's token becomes less likely where it was called for; elsewhere little changes."""
    try:
        model = load("smollm2")
    except MissingAsset:
        pytest.skip("SmolLM2 is not on this machine")
    net = model.module()

    @torch.inference_mode()
    def log_probabilities(prompt: str) -> torch.Tensor:
        return net(**model.tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(0)

    elsewhere = [log_probabilities(prompt) for prompt in ELSEWHERE]
    before = [log_probabilities(prompt) for prompt in CALLED_FOR]
    result = target(model, "dog")
    assert result.text == " dog"
    assert result.probability > 0.9 > 0.1 > result.start
    with applied(net, result.edits):
        after = [log_probabilities(prompt) for prompt in CALLED_FOR]
        changed = [log_probabilities(prompt) for prompt in ELSEWHERE]
    falls = [(p - q)[result.token].item() for p, q in zip(before, after, strict=True)]
    divergences = [(p.exp() * (p - q)).sum().item() for p, q in zip(elsewhere, changed, strict=True)]
    assert min(falls) > 0
    assert statistics.mean(falls) > 1, "nats"
    assert statistics.median(divergences) < 0.5, "nats; the edits must not wreck the rest"
    assert torch.equal(log_probabilities(CALLED_FOR[0]), before[0]), "undone to the bit"
