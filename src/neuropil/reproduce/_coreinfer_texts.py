"""Texts on differing subjects for the CoreInfer reproduction, and a small rectified language model of letters."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.data import text
from neuropil.training import fit

MODULES = (
    "argparse ast bdb calendar cgitb cmd codecs configparser copy csv datetime decimal difflib dis doctest "
    "enum filecmp fractions ftplib functools gettext heapq imaplib inspect ipaddress locale mailbox mimetypes "
    "nntplib optparse pathlib pdb pickle platform plistlib poplib pprint profile pydoc random sched shelve "
    "shlex shutil smtplib socket statistics string subprocess tarfile tempfile textwrap threading timeit "
    "tokenize traceback turtle typing uuid warnings wave weakref zipfile"
).split()
LETTERS = 128  # ASCII


@lru_cache(maxsize=1)
def _brown() -> Any:
    return text("brown")


def documents(topic: str) -> list[str]:
    """Texts on one subject: "python" (sources of the standard library), "manual" (Python's own help pages, English),
    "bible", or a genre of the Brown corpus."""
    if topic == "python":
        origins = [Path(spec.origin) for name in MODULES if (spec := importlib.util.find_spec(name)) and spec.origin]
        return [path.read_text(encoding="utf-8") for path in origins if path.suffix == ".py"]
    if topic == "manual":
        from pydoc_data.topics import topics

        return sorted(topics.values(), key=len)[-24:]
    if topic == "bible":
        return [book for book in text("kjv").documents if len(book) > 6000]
    brown = _brown()
    return [document for document, genre in zip(brown.documents, brown.kinds, strict=True) if genre == topic]


def drawn(topic: str, count: int, generator: torch.Generator) -> list[str]:
    """So many different documents on a subject."""
    found = documents(topic)
    return [found[i] for i in torch.randperm(len(found), generator=generator)[:count].tolist()]


def letters(source: str) -> Tensor:
    """A text as numbers of ASCII letters; others become question marks."""
    return torch.tensor(list(source.encode("ascii", "replace")))


def letter_model(train: list[str], steps: int, length: int, seed: int) -> nn.Module:
    """An OPT (ReLU) of letters, trained on these texts: 3 layers, width 96, 384 neurons a layer."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=LETTERS,
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=length,
        dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    net: Any = OPTForCausalLM(config)
    stream = letters("\n".join(train))
    windows = stream[: len(stream) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[: 8 * steps]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)

    def loss(model: Any, batch: Any) -> Tensor:
        ids = batch[0] if isinstance(batch, tuple | list) else batch
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    data = torch.utils.data.TensorDataset(windows[order])
    fit(net, data, loss, optimizer, scheduler=schedule, steps=steps, batch_size=8, seed=seed, progress=False)
    return net.eval()
