"""Models for the tests of bricks: tiny ones of several families, and one whose groups of neurons are planted."""

from typing import Any

import torch
from tiny_models import llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, OPTConfig, Phi3Config

GROUPS, EACH, WIDTH = 8, 6, 4  # planted groups, neurons of each, inputs of each


def ids(rows: int = 4, length: int = 10, seed: int = 0, low: int = 3, high: int = 60) -> Tensor:
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def family(name: str) -> Any:
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    if name == "llama":
        return llama()
    made = {
        "opt": lambda: OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_inner=48),
        "phi3": lambda: Phi3Config(**shape, intermediate_size=48, num_key_value_heads=2),
        "mixtral": lambda: MixtralConfig(**shape, intermediate_size=16, num_key_value_heads=2, num_local_experts=2),
    }
    return AutoModelForCausalLM.from_config(made[name]()).eval()


def planted(gated: bool, seed: int = 0) -> tuple[Any, Tensor]:
    """Groups of neurons that read and write inputs of their own, mixed up; the group of each."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(GROUPS).repeat_interleave(EACH)[torch.randperm(GROUPS * EACH, generator=generator)]
    mask = (group[:, None] == torch.arange(GROUPS).repeat_interleave(WIDTH)).float()
    base = torch.randn(GROUPS, GROUPS * WIDTH, generator=generator)[group]

    def rows() -> Tensor:
        return mask * (base + 0.3 * torch.randn(mask.shape, generator=generator))

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (nn.Linear(GROUPS * WIDTH, len(group), bias=False) for _ in range(2))
            self.down = nn.Linear(len(group), GROUPS * WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    net: Any = Gated() if gated else nn.Sequential(nn.Linear(GROUPS * WIDTH, len(group), bias=False), nn.ReLU(),
                                                   nn.Linear(len(group), GROUPS * WIDTH))  # fmt: skip
    with torch.no_grad():
        reads, write = ([net.gate, net.up], net.down) if gated else ([net[0]], net[2])
        for module in reads:
            module.weight.copy_(rows())
        write.weight.copy_(rows().T)
    return net, group


def one_group_at_a_time(tokens: int = 400, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(GROUPS, (tokens,), generator=generator)
    x = torch.randn(tokens, GROUPS * WIDTH, generator=generator)
    return x * (which[:, None] == torch.arange(GROUPS).repeat_interleave(WIDTH))
