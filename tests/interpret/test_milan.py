"""MILAN: the search against exhaustive enumeration, the score's algebra, encoder, captioner and estimator."""

import itertools
import math
from pathlib import Path

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.interpret.milan import (
    MILAN,
    Captioner,
    LanguageModel,
    RegionEncoder,
    UnknownLayer,
    Vocabulary,
    beam_search,
    bleu,
    exemplars,
    pool,
    search,
)
from neuropil.interpret.milan.language import PAD, START, STOP, tokens
from neuropil.interpret.milan.search import forced, mutual_information

WORDS = ("red", "blue", "ball", "box")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def captioner(seed: int = 0, features: int = 6, words: tuple[str, ...] = WORDS) -> Captioner:
    torch.manual_seed(seed)
    net = Captioner(Vocabulary(words), features, embedding=5, hidden=8).eval()
    with torch.no_grad():
        net.out.weight.mul_(6)  # far from uniform
    return net


def language_model(seed: int = 1, words: tuple[str, ...] = WORDS) -> LanguageModel:
    torch.manual_seed(seed)
    net = LanguageModel(Vocabulary(words), embedding=5, hidden=8).eval()
    with torch.no_grad():
        net.out.weight.mul_(6)
    return net


def toy(seed: int = 0, units: int = 24) -> tuple[Tensor, list[list[str]]]:
    """Sets of vectors whose mean says which of two sentences is theirs."""
    signs = torch.arange(units) % 2
    keys = draw(units, 4, 6, seed=seed) + 3 * (2.0 * signs - 1)[:, None, None]
    return keys, [
        ["many red balls here", "here are red balls"] if s else ["blue boxes and nothing else"] for s in signs.tolist()
    ]


def specimen(seed: int = 0) -> tuple[MILAN, Tensor, list[list[str]]]:
    made = MILAN(hidden=8, embedding=4, epochs=6, lm_epochs=3, lr=0.02, beam=4, length=5, random_state=seed)
    return made, *toy(seed)


# --- words -----------------------------------------------------------------------------------------


def test_words_come_back() -> None:
    said = ["a red-and-white ball, striped.", "don't", "the man's hat"]
    vocabulary = Vocabulary.of(said)
    assert vocabulary.decode(vocabulary.encode(said, 15)) == said
    assert vocabulary.encode(["zebra"], 3).tolist() == [[START, 3, STOP, PAD]]
    assert vocabulary.encode(["a a a a"], 2)[0].tolist()[1:] == [vocabulary.places["a"]] * 2
    assert Vocabulary.of(["a b b"], least=2).words[4:] == ("b",)
    with pytest.raises(ValueError, match="twice"):
        Vocabulary(["a", "a"])


@given(st.text(max_size=30))
@settings(max_examples=50, deadline=None)
def test_tokens_lose_nothing_but_space_and_case(text: str) -> None:
    kept = "".join(text.lower().split())
    assert "".join(tokens(text)) == kept


SENTENCE = st.lists(st.sampled_from("a red blue ball above the box".split()), min_size=1, max_size=8).map(" ".join)


@given(st.lists(st.tuples(SENTENCE, st.lists(SENTENCE, min_size=2, max_size=2)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_bleu_is_sacrebleus(pairs: list[tuple[str, list[str]]]) -> None:
    found, references = [p[0] for p in pairs], [p[1] for p in pairs]
    theirs = sacrebleu.corpus_bleu(found, list(map(list, zip(*references, strict=True))), tokenize="none", force=True)
    assert bleu(found, references) == pytest.approx(theirs.score, abs=1e-6)


# --- the two probabilities -------------------------------------------------------------------------


def test_the_language_model_is_a_distribution() -> None:
    """All strings of at most two words, and what goes on after two, sum to one."""
    net = language_model(words=("red", "blue", "ball"))
    words = range(len(net.vocabulary))
    done = [(w, STOP) for w in words if w != STOP] + [(STOP, PAD)]
    going = [(a, b) for a in words if a != STOP for b in words if b != STOP]
    strings = torch.tensor([(START, *s) for s in done + going])
    # A string that goes on is all of its continuations together. PAD is a word like any other to the model here.
    log_p = net(strings).gather(2, strings[:, 1:, None])[:, :, 0]
    log_p[len(done) - 1, 1] = 0.0
    assert float(log_p.sum(1).exp().sum()) == pytest.approx(1, abs=1e-5)
    ended = strings[[0, 4, len(done) - 1]]
    torch.testing.assert_close(net.score(ended)[:1], log_p[:1].sum(1))
    torch.testing.assert_close(net.score(ended)[2], log_p[len(done) - 1, 0])


def test_forced_scores_are_the_sum_of_the_greedy_steps() -> None:
    net, keys = captioner(), draw(5, 15, 6)
    look = net.looker(keys)
    with torch.no_grad():
        found, scores = beam_search(look.step, net.start(keys), beam=1, length=7)
        captions = torch.cat([torch.full((5, 1), START), found[:, 0]], 1)
        torch.testing.assert_close(net.score(keys, captions), scores[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(forced(look.step, net.start(keys), found), scores, rtol=0, atol=1e-5)
    lm = language_model()
    torch.testing.assert_close(
        forced(lm.step, lm.start(5), found)[:, 0], lm.score(captions).detach(), rtol=0, atol=1e-5
    )


def test_the_order_of_exemplars_says_nothing() -> None:
    net, keys = captioner(), draw(3, 15, 6)
    captions = net.vocabulary.encode(["red ball", "blue", "box box red"], 6)
    mixed = keys[:, torch.randperm(15, generator=torch.Generator().manual_seed(4))]
    torch.testing.assert_close(net.score(mixed, captions), net.score(keys, captions), rtol=0, atol=1e-5)


def test_the_loss_is_likelihood_and_spread_attention_by_hand() -> None:
    net, keys = captioner(), draw(2, 3, 6)
    captions = net.vocabulary.encode(["red ball", "blue"], 5)
    log_p, attention = net(keys, captions)
    likely, spread = [], []
    for row, count in enumerate((3, 2)):  # words and the stop
        likely += [-log_p[row, t, captions[row, t + 1]] for t in range(count)]
        spread += [(1 - attention[row, :count, j].sum()) ** 2 for j in range(3)]
    expected = torch.stack(likely).mean() + torch.stack(spread).mean()
    torch.testing.assert_close(net.loss(keys, captions), expected)
    torch.testing.assert_close(attention.sum(2), torch.ones(2, 5))


def test_a_captioner_is_its_equations() -> None:
    net, keys = captioner(), draw(1, 4, 6)
    v = keys[0]
    h, c = (nn.functional.linear(v.mean(0), w.weight, w.bias).tanh() for w in (net.first_h, net.first_c))
    a = torch.stack([net.weigh((net.query(h) + net.key(x)).tanh())[0] for x in v]).softmax(0)
    context = (a[:, None] * v).sum(0) * net.gate(h).sigmoid()
    h, _ = net.cell(torch.cat([net.embed(torch.tensor(START)), context])[None], (h[None], c[None]))
    log_p, attention = net(keys, torch.tensor([[START, STOP]]))
    torch.testing.assert_close(log_p[0, 0], net.out(h[0]).log_softmax(0))
    torch.testing.assert_close(attention[0, 0], a)


# --- the search ------------------------------------------------------------------------------------


def everything(words: int, length: int) -> Tensor:
    """All sequences of at most `length` tokens: they end with the stop, or are as long as may be."""
    usable = [w for w in range(words) if w not in (START, STOP, PAD)]
    found = []
    for size in range(length):
        found += [(*s, STOP, *[PAD] * (length - size - 1)) for s in itertools.product(usable, repeat=size)]
    found += list(itertools.product(usable, repeat=length))
    return torch.tensor(found)


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_all_sentences_is_exhaustive(seed: int) -> None:
    words = ("red", "ball")
    net, keys = captioner(seed, words=words), draw(3, 5, 6, seed=seed)
    every = everything(len(net.vocabulary), 3)  # of stop, unknown and two words: vocabulary 4, length 3
    look = net.looker(keys)
    with torch.no_grad():
        found, scores = beam_search(look.step, net.start(keys), beam=4**3, length=3)
        all_scores = forced(look.step, net.start(keys), every.expand(3, -1, -1))
    assert int(scores[0].isfinite().sum()) == len(every)
    best = all_scores.topk(len(every), 1)
    torch.testing.assert_close(scores[:, : len(every)], best.values, rtol=0, atol=1e-5)
    assert torch.equal(found[:, 0], every[best.indices[:, 0]])
    assert not scores[:, len(every) :].isfinite().any()


@pytest.mark.parametrize("lam", [0.2, 1.0])
def test_rerank_over_all_sentences_is_the_exhaustive_argmax(lam: float) -> None:
    words = ("red", "ball")
    net, lm, keys = captioner(2, words=words), language_model(3, words=words), draw(4, 5, 6)
    every = everything(len(net.vocabulary), 3).expand(4, -1, -1)
    with torch.no_grad():
        score = forced(net.looker(keys).step, net.start(keys), every)
        score = score - lam * forced(lm.step, lm.start(4), every)
    for settings_ in ({"strategy": "rerank"}, {"strategy": "beam", "mi": True}):
        found = search(net, keys, lm, lam=lam, beam=64, length=3, **settings_)
        torch.testing.assert_close(found.score[:, 0], score.amax(1), rtol=0, atol=1e-5)
        assert torch.equal(found.tokens[:, 0], every[range(4), score.argmax(1)])
        torch.testing.assert_close(found.score[:, :9], score.sort(1, descending=True).values[:, :9], rtol=0, atol=1e-5)


def test_without_the_prior_it_is_captioning() -> None:
    net, lm, keys = captioner(), language_model(), draw(6, 15, 6)
    zero = search(net, keys, lm, lam=0.0, beam=10, length=6)
    plain = search(net, keys, lam=0.0, beam=10, length=6, strategy="beam")
    assert torch.equal(zero.tokens, plain.tokens)
    assert torch.equal(zero.score, plain.score)
    look, state = net.looker(keys), net.start(keys)
    words = torch.full((6, 1), START)
    stepped, _ = mutual_information(look.step, lm.step, 0.0, 2)(words, (*state, *lm.start(6)))
    assert torch.equal(stepped, look.step(words, state)[0])  # bit for bit
    mi = search(net, keys, lm, lam=0.0, beam=10, length=6, strategy="beam", mi=True)
    assert torch.equal(mi.tokens, plain.tokens)


@pytest.mark.parametrize("lam", [0.0, 0.2, 1.0])
def test_one_beam_is_reranked_with_any_share(lam: float) -> None:
    net, lm, keys = captioner(), language_model(), draw(6, 15, 6)
    again = search(net, keys, lm, lam=0.0, beam=10, length=6).at(lam)
    direct = search(net, keys, lm, lam=lam, beam=10, length=6)
    assert torch.equal(again.tokens, direct.tokens)
    assert torch.equal(again.score, direct.score)


def test_a_huge_share_of_the_prior_takes_the_least_usual_of_the_beam() -> None:
    net, lm, keys = captioner(), language_model(), draw(6, 15, 6)
    found = search(net, keys, lm, lam=1e4, beam=10, length=6)
    assert torch.equal(found.prior[:, 0], found.prior.amin(1))


def test_the_score_is_affine_in_the_share() -> None:
    net, lm, keys = captioner(), language_model(), draw(6, 15, 6)
    by_sentence = []
    for lam in (0.2, 1.0):
        found = search(net, keys, lm, lam=lam, beam=8, length=6)
        key = found.tokens @ (10 ** torch.arange(6))
        order = key.argsort(1)
        by_sentence.append([x.gather(1, order) for x in (key, found.score, found.prior)])
    (key, a, prior), (other, b, _) = by_sentence
    assert torch.equal(key, other)
    torch.testing.assert_close(a - b, 0.8 * prior, rtol=0, atol=1e-4)


def test_a_decoder_that_does_not_look_has_no_information() -> None:
    """p(d|E) = p(d) for all d: the pointwise mutual information is zero for every d."""

    class Blind(Captioner):
        def looker(self, keys: Tensor) -> LanguageModel:  # type: ignore[override]
            return self.lm

        def start(self, keys: Tensor) -> tuple[Tensor, ...]:
            return self.lm.start(len(keys))

    lm = language_model()
    blind = Blind(lm.vocabulary, 6, 5, 8)
    blind.lm = lm
    for chosen in ({"strategy": "rerank"}, {"strategy": "beam", "mi": True}, {"strategy": "greedy", "mi": True}):
        found = search(blind, draw(3, 5, 6), lm, lam=1.0, beam=6, length=5, **chosen)
        assert torch.equal(found.score, torch.zeros_like(found.score))


def test_samples_follow_the_probabilities() -> None:
    net, keys = captioner(), draw(1, 5, 6)
    look = net.looker(keys)

    def usable(words: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        each, state = look.step(words, state)
        each[:, :, [START, PAD]] = -torch.inf
        return each.log_softmax(2), state

    every = everything(len(net.vocabulary), 2)
    with torch.no_grad():
        p = forced(usable, net.start(keys), every[None])[0].exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    g = torch.Generator().manual_seed(0)
    found = search(net, keys, lam=0.0, beam=5000, length=2, strategy="sample", generator=g)
    assert (found.score.diff() <= 0).all()
    share = (found.tokens[0][:, None] == every).all(2).float().mean(0)
    torch.testing.assert_close(share, p, rtol=0, atol=5 * (0.25 / 5000) ** 0.5)


def test_greedy_is_a_beam_of_one() -> None:
    net, keys = captioner(), draw(4, 5, 6)
    greedy = search(net, keys, strategy="greedy", lam=0.0, length=6)
    assert torch.equal(greedy.tokens, search(net, keys, strategy="beam", beam=1, lam=0.0, length=6).tokens)
    assert greedy.tokens.shape == (4, 1, 6)


def test_bad_settings_of_the_search() -> None:
    net, keys = captioner(), draw(2, 3, 6)
    with pytest.raises(ValueError, match="not the same"):
        search(net, keys, language_model(words=("red", "blue")))
    with pytest.raises(ValueError, match="expected one of rerank"):
        search(net, keys, strategy="loud")
    with pytest.raises(ValueError, match="mi=True"):
        search(net, keys, mi=True)
    with pytest.raises(ValueError, match="lam is"):
        search(net, keys, lam=-0.1)
    with pytest.raises(ValueError, match="expected 1 or more"):
        search(net, keys, beam=0)
    with pytest.raises(ValueError, match="made for 6"):
        search(net, draw(2, 3, 5))


# --- the encoder -----------------------------------------------------------------------------------


def pyramid(seed: int = 0) -> RegionEncoder:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3)
    )
    return RegionEncoder(net, ["1", "3"])


def test_a_whole_mask_is_global_average_pooling() -> None:
    encoder, x = pyramid(), torch.rand(4, 3, 16, 16)
    levels = encoder.levels((x - encoder.mean) / encoder.std)
    expected = torch.cat([m.mean((2, 3)) for m in levels], 1)
    torch.testing.assert_close(encoder(x, torch.ones(4, 1, 16, 16)), expected)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_masks_are_weights(seed: int) -> None:
    maps, mask = draw(2, 3, 4, 4, seed=seed), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(pool(maps, 10 * mask), pool(maps, mask))
    empty = pool(maps, torch.zeros(2, 1, 8, 8))
    assert torch.equal(empty, torch.zeros(2, 3))
    one = torch.zeros(2, 1, 4, 4)
    one[0, 0, 1, 2] = one[1, 0, 3, 0] = 1
    torch.testing.assert_close(pool(maps, one), torch.stack([maps[0, :, 1, 2], maps[1, :, 3, 0]]))


def test_sets_are_encoded_as_their_pictures_are() -> None:
    encoder = pyramid()
    probe = torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    found = exemplars(encoder.net, probe, "3", k=4)
    keys = encoder.encode(found, rows=3)
    assert keys.shape == (8, 4, 12)
    masks = found.masks((16, 16))
    again = encoder(found.pictures()[5].float() / 255, masks[5].float())
    torch.testing.assert_close(keys[5], again)
    torch.testing.assert_close(encoder.encode((found.pictures(), masks)), keys)
    both = encoder.regions(found.pictures()[0].float() / 255, masks[0].float())
    torch.testing.assert_close(both[:, 0], keys[0])


def test_the_spatial_encoder_gives_places() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
    encoder = RegionEncoder(net, ["1"], spatial=True)
    x, mask = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[:, :, :4] = 1
    expected = net((x - encoder.mean) / encoder.std * mask)
    torch.testing.assert_close(encoder(x, mask).transpose(1, 2).unflatten(2, (4, 4)), expected)
    assert encoder.encode((x[None], mask[None])).shape == (1, 2 * 16, 5)


def test_an_encoder_names_the_layers_there_are() -> None:
    with pytest.raises(UnknownLayer, match="near names: 0"):
        RegionEncoder(nn.Sequential(nn.Conv2d(3, 1, 1)), ["layer1"])
    with pytest.raises(ValueError, match="layers is empty"):
        RegionEncoder(nn.Sequential(nn.Conv2d(3, 1, 1)), [])


# --- the estimator ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> MILAN:
    keys, said = toy(units=60)
    return MILAN(hidden=16, embedding=8, lr=0.02, epochs=25, lm_epochs=10, beam=10, length=6).fit(keys, said)


def test_it_learns_what_the_vectors_say(learned: MILAN) -> None:
    keys, said = toy(seed=9)
    found = learned.describe(keys)
    assert all(d.text in s for d, s in zip(found, said, strict=True))
    for d in found:
        assert d.score == pytest.approx(d.given - 0.2 * d.prior, abs=1e-5)
    assert learned.score(keys, said) > 90
    assert [learned.vocabulary_.decode(learned.search(keys).tokens[:, 0])[i] for i in (0, 1)] == [
        d.text for d in found[:2]
    ]


def test_it_is_kept_on_disk(learned: MILAN, tmp_path: Path) -> None:
    keys, _ = toy(seed=5)
    again = MILAN.load(learned.save(tmp_path / "kept"))
    assert again.get_params() == learned.get_params()
    assert again.describe(keys) == learned.describe(keys)
    with pytest.raises(ModelError, match="no captioner"):
        MILAN.load(tmp_path)


def test_dead_units_are_not_described(learned: MILAN) -> None:
    class Encoder(RegionEncoder):
        def encode(self, regions: object, rows: int = 8) -> Tensor:
            return toy(units=3)[0]

    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.copy_(torch.tensor([0.0, -9.0, 0.0]))
    milan = MILAN(Encoder(net, ["1"])).set_params(beam=5)
    milan.vocabulary_, milan.captioner_, milan.lm_ = learned.vocabulary_, learned.captioner_, learned.lm_
    found = milan.describe(exemplars(net, torch.rand(20, 3, 4, 4), "1", k=4))
    assert [bool(d.text) for d in found] == [True, False, True]
    assert math.isnan(found[1].score)


def test_bad_input_of_the_estimator() -> None:
    keys, said = toy()
    with pytest.raises(ValueError, match="need an encoder"):
        MILAN().fit((torch.rand(1, 2, 3, 4, 4), torch.ones(1, 2, 1, 4, 4)), said)
    with pytest.raises(ValueError, match=r"expected \[units, exemplars, features\]"):
        MILAN().fit(keys[0], said)
    with pytest.raises(ValueError, match="expected as many"):
        MILAN().fit(keys, said[:-1])
    with pytest.raises(ValueError, match="no sentence"):
        MILAN().fit(keys, [[], *said[1:]])
    with pytest.raises(ValueError, match="at least two"):
        MILAN().fit(keys[:1], said[:1])
