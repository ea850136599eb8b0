"""Readable tokens of every kind of vocabulary."""

import time

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from neuropil.models import Model, load
from neuropil.models.vocabulary import byte_of, texts

from .families import build
from .test_gguf import needs_smollm2

LINES = ["The dog ran. Dogs run, naïve dogs cafés 😀 the dog runs"] * 3


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|Ġend|>"])
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_level_tokens_keep_their_space() -> None:
    tokenizer = byte_level()
    found = texts(tokenizer)
    assert " dog" in found
    assert found[0] == "<|Ġend|>"  # an added token is text, not bytes
    assert len(byte_of()) == len(set(byte_of().values())) == 256
    # Each token alone is what the tokenizer's own decoder makes of it.
    assert found[1:] == [tokenizer.decode([i]) for i in range(1, len(found))]
    ids = tokenizer("The dog runs, cafés 😀")["input_ids"]
    vocabulary = tokenizer.convert_ids_to_tokens(ids)
    assert bytes(byte_of()[c] for t in vocabulary for c in t).decode() == "The dog runs, cafés 😀"


def test_sentencepiece_tokens_keep_their_space() -> None:
    vocabulary = [
        ("<unk>", 0.0),
        ("<0xE2>", -1.0),
        ("<0x41>", -1.0),
        ("\u2581dog", -1.0),
        ("s", -2.0),
        ("\u2581", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert texts(wrapped) == ["<unk>", "\ufffd", "A", " dog", "s", " "]


def test_wordpieces_and_gaps_in_the_numbers() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "dog": 2, "##s": 4}, unk_token="[UNK]"))
    assert texts(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == ["[UNK]", "", "dog", "", "##s"]


def test_padding_of_the_vocabulary_is_dropped() -> None:
    tokenizer = byte_level()
    known = len(texts(tokenizer))
    module = build("llama-untied")
    module.resize_token_embeddings(known + 57, mean_resizing=False)
    model = load(module, tokenizer=tokenizer)
    assert model.head().weight.shape == (known, 32)
    assert len(model.tokens()) == known
    module.resize_token_embeddings(known - 3, mean_resizing=False)  # and tokens that the model has no row for
    model = load(module, tokenizer=tokenizer)
    assert model.head().weight.shape == (known - 3, 32)
    assert len(model.tokens()) == known - 3


@needs_smollm2
def test_smollm2_tokens_are_what_its_decoder_says_and_quick(smollm2: Model) -> None:
    model = smollm2
    assert model.tokenizer is not None
    start = time.process_time()
    found = model.tokens()
    assert time.process_time() - start < 1.5
    assert found == texts(model.tokenizer)
    assert len(found) == 49152
    assert {" dog", " Paris", "\n"} <= set(found)
    decoded = model.tokenizer.backend_tokenizer.decode_batch([[i] for i in range(49152)], skip_special_tokens=False)
    assert found == decoded


@pytest.mark.parametrize("text", [" dog", "dog", "\n\n", "<|im_start|>"])
@needs_smollm2
def test_smollm2_token_of_a_text(text: str, smollm2: Model) -> None:
    model = smollm2
    [number] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert model.tokens()[number] == text
