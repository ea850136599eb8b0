"""Decoding: the sheet's invariants on random weights, the schema of its columns, and the real model."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, llama, tiny, words
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from neuropil.errors import ModelError, NoNeurons
from neuropil.interpret import Decoder, compare, decode, decode_rows
from neuropil.interpret.concepts import Concepts, stem
from neuropil.interpret.rows import Moments
from neuropil.models import load


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def specimen(seed: int = 0) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The best token's cosine of each row, a batch of rows at a time."""
    generator = torch.Generator().manual_seed(seed)
    head, rows = torch.randn(300, 16, generator=generator), torch.randn(11, 16, generator=generator)

    def score(model: torch.Tensor, data: torch.Tensor, batch_size: int) -> torch.Tensor:
        parts = data.split(batch_size)
        return torch.cat([decode_rows(part, model, score="cosine", top_k=1).scores[:, 0] for part in parts])

    return score, head, rows


# --- rows ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_dot_scores_are_linear(seed: int, a: float, b: float) -> None:
    head, u = draw(seed, 50, 12), draw(seed + 1, 2, 12)

    def scores(rows: torch.Tensor) -> torch.Tensor:
        found = decode_rows(rows, head, top_k=50, side="positive")
        return torch.zeros(len(rows), 50).scatter(1, found.tokens, found.scores)

    both = scores(u)
    torch.testing.assert_close(scores(a * u[:1] + b * u[1:]), a * both[:1] + b * both[1:], rtol=1e-4, atol=1e-4)


def test_softmax_sums_to_one_and_temperature_keeps_the_ranking() -> None:
    head, rows = draw(0, 80, 16), draw(1, 6, 16)
    one = decode_rows(rows, head, score="softmax", top_k=80, side="positive")
    hot = decode_rows(rows, head, score="softmax", top_k=80, side="positive", temperature=3.0)
    torch.testing.assert_close(one.scores.sum(1), torch.ones(6))
    torch.testing.assert_close(hot.scores.sum(1), torch.ones(6))
    assert torch.equal(one.tokens, hot.tokens)
    torch.testing.assert_close(hot.scores[:, 0], (rows @ head.T / 3).softmax(1).amax(1))


def test_planted_tokens_are_found_on_either_side() -> None:
    head = draw(0, 200, 64)
    tokens = torch.tensor([0, 17, 199])
    rows = head[tokens] / head[tokens].norm(dim=1, keepdim=True)
    up = decode_rows(rows, head, score="cosine", top_k=1)
    assert up.tokens[:, 0].tolist() == tokens.tolist()
    torch.testing.assert_close(up.scores[:, 0], torch.ones(3), atol=1e-6, rtol=0)
    down = decode_rows(-rows, head, score="cosine", top_k=1, side="both")
    assert down.negative_tokens is not None
    assert down.negative_tokens[:, 0].tolist() == tokens.tolist()
    assert decode_rows(rows, head, side="positive").negative_tokens is None


def test_identity_head_gives_the_row_itself() -> None:
    rows = draw(0, 5, 30)
    found = decode_rows(rows, torch.eye(30), top_k=4)
    values, tokens = rows.topk(4)
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.scores, values)


@pytest.mark.parametrize("score", ["cosine", "z"])
def test_scaling_a_row_leaves_normalised_scores(score: str) -> None:
    head, rows = draw(0, 90, 10), draw(1, 7, 10)
    a, b = (decode_rows(r, head, score=score, top_k=9) for r in (rows, 37.5 * rows))
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.scores, b.scores)


def test_a_constant_added_to_the_head_moves_cosines_but_no_dot_ranking() -> None:
    head, rows, shift = draw(0, 90, 10), draw(1, 7, 10), draw(2, 10)
    for score, same in (("dot", True), ("z", True), ("cosine", False)):
        a, b = (decode_rows(rows, h, score=score, top_k=90).tokens for h in (head, head + 5 * shift))
        assert torch.equal(a, b) is same


def test_z_scores_are_the_standardised_dot_products() -> None:
    head, rows = draw(0, 400, 20) + 1, draw(1, 5, 20)
    full = (rows @ head.T).double()
    mean, std = Moments(head)(rows)
    torch.testing.assert_close(mean, full.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std, full.std(1, correction=0), rtol=1e-5, atol=1e-5)
    found = decode_rows(rows, head, score="z", top_k=3)
    expected = ((full - full.mean(1, keepdim=True)) / full.std(1, keepdim=True, correction=0)).topk(3).values
    torch.testing.assert_close(found.scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_bad_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 'dot'"):
        decode_rows(draw(0, 2, 4), draw(1, 9, 4), score="loud")
    with pytest.raises(ValueError, match="temperature"):
        decode_rows(draw(0, 2, 4), draw(1, 9, 4), temperature=0.0)


# --- words -----------------------------------------------------------------------------------------


def test_variants_of_a_word_are_one_concept() -> None:
    tokens = [" dog", "Dogs", "DOG", "dog", " dogma", " cat", " ", ""]
    concepts = Concepts(tokens)
    assert concepts.ids("dogs") == [0, 1, 2, 3]
    assert concepts.group[4] not in concepts.group[:4]
    assert concepts.group[6] != concepts.group[7]  # blanks are nothing in common
    assert concepts.ids("zebra") == []


@given(st.text(max_size=12))
def test_stem_ignores_case_and_space(text: str) -> None:
    assert stem(text) == stem(f"  {text} ")
    assert stem(text) == stem(text.strip().casefold())


# --- models ----------------------------------------------------------------------------------------


def test_columns_agree_with_the_plain_computation() -> None:
    model = tiny()
    net, head = model.module(), model.head().weight
    decoder = Decoder(model, top_k=5)
    for site, block in zip(model.sites, net.model.layers, strict=True):
        table = pa.table(decoder.columns(site))
        weights = {
            "up": block.mlp.up_proj.weight,
            "gate": block.mlp.gate_proj.weight,
            "down": block.mlp.down_proj.weight.T,
        }
        cosines = {
            w: nn.functional.normalize(u.double()) @ nn.functional.normalize(head.double()).T
            for w, u in weights.items()
        }
        for role, cos in cosines.items():
            assert table[f"{role}_token_ids"].to_pylist() == cos.topk(5).indices.tolist()
            assert table[f"{role}_neg_token_ids"].to_pylist() == (-cos).topk(5).indices.tolist()
            np.testing.assert_allclose(table[f"{role}_scores"].to_pylist(), cos.topk(5).values.detach(), rtol=1e-5)
        everything = torch.stack(list(cosines.values()))  # [3, width, V]
        strongest = everything.abs().amax((0, 2))
        token = torch.tensor(table["label_token"].to_pylist())
        for i, role in enumerate(cosines):
            np.testing.assert_allclose(
                table[f"cos_{role}"].to_pylist(),
                everything[i].gather(1, token[:, None]).squeeze(1).detach(),
                rtol=1e-5,
                atol=1e-7,
            )
        rows = {w: i for i, w in enumerate(cosines)}
        source = torch.tensor([rows[w] for w in table["label_from"].to_pylist()])
        own = everything[source, torch.arange(site.width), token]
        torch.testing.assert_close(own.abs(), strongest)
        assert torch.equal(own.sign(), torch.tensor(table["label_sign"].to_pylist()).double())
        bar = np.quantile(decoder.null, 0.99)
        np.testing.assert_allclose(table["specialisation"].to_pylist(), (strongest / bar).detach(), rtol=1e-5)
        prob = (weights["up"] @ head.T).softmax(1).amax(1)
        np.testing.assert_allclose(table["up_probability"].to_pylist(), prob.detach(), rtol=1e-4)


def test_random_weights_are_not_specialised() -> None:
    """The null percentile does its work: about 1 % of random neurons pass the 99th."""
    table = decode(tiny(), progress=False)
    share = np.mean(table["specialised"].to_pylist())
    assert share < 0.06
    named = np.array(table["null_percentile"].to_pylist()) >= 95
    assert [bool(label) for label in table["label"].to_pylist()] == named.tolist()


def test_a_hub_is_flagged_and_a_strong_specialist_is_not() -> None:
    net = llama(vocabulary=400)
    crowd = draw(5, 32)
    with torch.no_grad():
        net.lm_head.weight[:40] = crowd + 0.3 * draw(6, 40, 32)  # a tenth of the vocabulary lies together
        net.model.layers[0].mlp.up_proj.weight[0] = crowd
        net.model.layers[0].mlp.up_proj.weight[1] = net.lm_head.weight[300]
    model = load(net, tokenizer=words(400))
    table = pa.table(Decoder(model).columns(model.sites[0]))
    assert table["hub"].to_pylist()[:2] == [True, False]
    assert table["specialised"].to_pylist()[:2] == [False, True]
    assert table["up_hub_tokens"].to_pylist()[0] >= 40


def test_folding_the_gain_is_scaling_the_rows() -> None:
    model = tiny()
    site = model.sites[1]
    plain, folded = Decoder(model), Decoder(model, fold_norm=True)
    gain = model.gain(site)
    assert gain is not None
    torch.testing.assert_close(folded.rows(site, "up"), plain.rows(site, "up") * gain)
    torch.testing.assert_close(folded.rows(site, "down"), plain.rows(site, "down") * model.head().gain)


def test_centering_keeps_the_dot_ranking() -> None:
    a, b = (decode(tiny(), score="dot", center=c, probability=False, progress=False) for c in (False, True))
    assert a["up_token_ids"].equals(b["up_token_ids"])
    assert not a["cos_up"].equals(b["cos_up"])


def test_tied_and_untied_heads_answer_alike() -> None:
    tied = llama(tied=True)
    untied = llama(seed=3)
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": tied.model.embed_tokens.weight.clone()})
    a, b = (decode(load(m, tokenizer=words()), progress=False) for m in (tied, untied))
    assert a.equals(b)


def test_conv1d_and_linear_weights_give_the_same_rows() -> None:
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=16)).eval()
    model = load(net, tokenizer=words())
    decoder = Decoder(model)
    [site] = model.sites
    torch.testing.assert_close(decoder.rows(site, "up"), net.transformer.h[0].mlp.c_fc.weight.T)
    torch.testing.assert_close(decoder.rows(site, "down"), net.transformer.h[0].mlp.c_proj.weight)
    table = pa.table(decoder.columns(site))
    # An ungated layer has the columns of a gate, empty, so that tables of mixed models fit together.
    assert table["gate_tokens"].null_count == table["cos_gate"].null_count == site.width


def test_layers_are_chosen_and_unknown_ones_refused() -> None:
    table = decode(tiny(), layers=[1], progress=False)
    assert set(table["layer"].to_pylist()) == {1}
    with pytest.raises(IndexError, match="0 to 1"):
        decode(tiny(), layers=[7], progress=False)


def test_unusable_models_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="expected some of up, gate, down"):
        Decoder(tiny(), which=("sideways",))
    with pytest.raises(ValueError, match="top_k"):
        Decoder(tiny(), top_k=0)
    with pytest.raises((ModelError, NoNeurons)):
        Decoder(load(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))))
    broken = llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        decode(load(broken, tokenizer=words()), progress=False)


# --- two checkpoints -------------------------------------------------------------------------------


def test_a_model_agrees_with_itself_and_not_with_a_permuted_layer() -> None:
    same = compare(tiny(), tiny())
    assert same.agreement == 1
    assert same.jaccard.tolist() == [1, 1]
    np.testing.assert_allclose(same.row_cosine, 1, atol=1e-6)
    shuffled = llama()
    with torch.no_grad():
        up = shuffled.model.layers[1].mlp.up_proj.weight
        up.copy_(up.roll(1, 0))  # no neuron keeps its place
    mixed = compare(tiny(), load(shuffled, tokenizer=words()))
    assert mixed.same_top[0] == 1
    assert mixed.same_top[1] < 0.2
    assert ((mixed.jaccard >= 0) & (mixed.jaccard <= 1)).all()


def test_models_of_other_shapes_are_not_compared() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY))
    with pytest.raises(ModelError, match="compare like with like"):
        compare(tiny(), load(other, tokenizer=words()))


# --- the real model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "label", "triple"),
    # Signs as measured on SmolLM2-135M-Instruct: the dog neuron reads -dog, is gated by and writes +dog.
    [
        (808, "dog", (-0.46, 0.27, 0.33)),
        (132, "math", (-0.56, 0.22, 0.48)),
        (1342, "water", (0.65, 0.43, -0.51)),
    ],
)
def test_known_neurons_of_smollm2(smollm2_layer: pa.Table, index: int, label: str, triple: tuple[float, ...]) -> None:
    row = smollm2_layer.slice(index, 1).to_pylist()[0]
    assert row["label"] == label
    assert row["specialised"]
    assert row["null_percentile"] == 100
    np.testing.assert_allclose([row["cos_up"], row["cos_gate"], row["cos_down"]], triple, atol=0.006)


def test_the_known_hub_of_smollm2(smollm2_layer: pa.Table) -> None:
    row = smollm2_layer.slice(1413, 1).to_pylist()[0]
    assert row["hub"]
    assert not row["specialised"]


@pytest.fixture(scope="module")
def smollm2_layer() -> pa.Table:
    """The last layer, up/gate/down."""
    model = load("smollm2")
    return pa.table(Decoder(model, probability=False).columns(model.sites[-1]))
