"""Small random language models with tokenizers of their own, made in milliseconds."""

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from neuropil.models import Model, load

VOCABULARY = 200


def words(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    syllables = ("ba", "do", "ki", "lu", "me", "no", "pa", "ru")
    names = ["".join(s) for s in itertools.product(syllables, repeat=3)][:size]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token=names[0]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def llama(seed: int = 0, tied: bool = False, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    net = LlamaForCausalLM(config).eval()
    for name, p in net.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 2.0)
    return net


def tiny(seed: int = 0, **kwargs: bool) -> Model:
    return load(llama(seed, **kwargs), tokenizer=words())
