"""`neuropil clamp`: the same prompt continued twice, the chosen neurons left alone and set."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from neuropil.cli import output
from neuropil.cli.app import AsJson, command
from neuropil.cli.atlas import load_model
from neuropil.cli.output import Column
from neuropil.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from neuropil.models import Model


class Where(StrEnum):
    """What is set: the output of the up-projection, or the product that the down-projection reads."""

    up = "up"
    hidden = "hidden"


def assignments(words: list[str]) -> tuple[str, dict[Any, float]]:
    """The model and the neurons' values among `[MODEL] NEURON=VALUE...`.

    >>> assignments(["29:808=30", "model.layers.29.mlp:500=-3.5"])
    ('smollm2', {'29:808': 30.0, 'model.layers.29.mlp:500': -3.5})
    """
    model = "smollm2"
    if words and "=" not in words[0]:
        model, *words = words
    if not words:
        raise _unset("give at least one neuron to set, such as 29:808=30.")
    values: dict[Any, float] = {}
    for word in words:
        address, _, value = word.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not address or not math.isfinite(number):
            raise _unset(f"got {word!r}; write NEURON=NUMBER, such as 29:808=30.")
        values[address] = number
    return model, values


def _unset(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="NEURON=VALUE")


@dataclass(frozen=True)
class Continuation:
    """What the model wrote after the prompt, and its probabilities of the very next token."""

    text: str
    next: Tensor  # [vocabulary]


@command(
    "clamp",
    "Models",
    'neuropil clamp 29:808=30 --prompt "My favourite animal is"',
    'neuropil clamp 29:808=60 --chat --prompt "What is your favourite animal?"',
    'neuropil clamp ./my-model 4:17=0 5:3=-2.5 --where hidden --prompt "The word is" --seed 1',
)
def clamp(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] NEURON=VALUE...",
            help="The model (smollm2 if left out; any that `atlas` takes), and the neurons with their values.",
            show_default=False,
        ),
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to be continued.")],
    where: Annotated[
        Where,
        typer.Option(
            help="up: set the up-projection's output, as the paper does; no effect where the gate is shut."
            " hidden: set the activation that the down-projection reads."
        ),
    ] = Where.up,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="Tokens to write.")] = 40,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt as a user's message.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(help="Sample, both runs with this seed, instead of the likeliest token each time."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set neurons to fixed values and read what the model then writes, before and after side by side."""
    name, values = assignments(words)
    model = load_model(name)
    from neuropil import neurons

    for address in values:  # an unknown neuron is said before the whole model is built
        neurons.Neuron.parse(address, model.sites)
    inputs = _inputs(model, prompt, chat)
    with _busy("building the model"):
        module = model.module()
    with _busy("writing, before"):
        before = _continue(model, inputs, tokens, seed)
    with _busy("writing, after"), neurons.clamp(module, values, where=where.value):
        after = _continue(model, inputs, tokens, seed)
    moved = _moved(model, before, after)
    if as_json:
        said = {"model": model.name, "prompt": prompt, "chat": chat, "clamps": values, "where": where.value}
        said |= {"seed": seed, "before": before.text, "after": after.text, "next_token": moved}
        return output.as_json(said)
    settings = ", ".join(f"{address} = {number:g}" for address, number in values.items())
    _side_by_side(prompt, before.text, after.text, settings)
    _next_tokens(moved)


@contextlib.contextmanager
def _busy(doing: str) -> Iterator[None]:
    if not output.errors().is_terminal:
        yield
        return
    with output.errors().status(doing):
        yield


def _inputs(model: Model, prompt: str, chat: bool) -> dict[str, Tensor]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer beside it, so it cannot read a prompt.")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(f"{model.name} has no chat template, so it is no chat model; leave out --chat.")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise typer.BadParameter("the prompt is empty; give at least one word.", param_hint="--prompt")
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


def _continue(model: Model, inputs: dict[str, Tensor], count: int, seed: int | None) -> Continuation:
    """Greedy without a seed; with one, sampled from the model's own distribution."""
    import torch

    module: Any = model.module()
    if not hasattr(module, "generate") or not module.can_generate():
        raise ModelError(f"{model.name} ({model.architecture}) writes no text; there is nothing to compare.")
    if seed is not None:
        torch.manual_seed(seed)
    tokenizer = model.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": seed is not None, "temperature": 1.0 if seed is not None else None}
    with torch.no_grad():
        made = module.generate(
            **inputs,
            max_new_tokens=count,
            pad_token_id=padding,
            top_p=None,
            top_k=0 if seed is not None else None,
            output_logits=True,
            return_dict_in_generate=True,
            **sampling,
        )
    start = 0 if module.config.is_encoder_decoder else inputs["input_ids"].shape[-1]
    text = tokenizer.decode(made.sequences[0, start:], skip_special_tokens=True)
    return Continuation(text, made.logits[0][0].float().softmax(-1))


def _moved(model: Model, before: Continuation, after: Continuation, count: int = 5) -> list[dict[str, Any]]:
    """The likeliest next tokens of either run, with their probabilities in both."""
    names = model.tokens()
    ids = [*before.next.topk(count).indices.tolist(), *after.next.topk(count).indices.tolist()]
    return [
        {
            "token": names[place] if place < len(names) else f"[{place}]",
            "token_id": place,
            "before": before.next[place].item(),
            "after": after.next[place].item(),
        }
        for place in dict.fromkeys(ids)
    ]


def _side_by_side(prompt: str, before: str, after: str, settings: str) -> None:
    if not output.is_terminal():
        for head, text in ((f"before: {prompt}", before), (f"after {settings}: {prompt}", after)):
            output.say(f"{output.clean(head)}\n{output.clean(text, newlines=True)}\n")
        return
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(Text("before"), ratio=1)
    table.add_column(Text.assemble("after ", (settings, "cyan")), ratio=1)
    table.add_row(*(Text(output.clean(prompt, newlines=True), style="dim") for _ in range(2)))
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
    changed = Text(output.clean(after[:same], newlines=True))
    changed.append(output.clean(after[same:], newlines=True), style="cyan")
    table.add_row(Text(output.clean(before, newlines=True)), changed)
    output.draw(table)
    output.say()


def _next_tokens(moved: list[dict[str, Any]]) -> None:
    def percent(value: float) -> str:
        return f"{100 * value:.2f} %" if value >= 0.0001 else f"{100 * value:.1g} %"

    def arrow(row: dict[str, Any]) -> Text:
        change = math.log(max(row["after"], 1e-30) / max(row["before"], 1e-30))
        style = "green" if change > 0.05 else "red" if change < -0.05 else "dim"
        return Text(output.number(change, signed=True), style=style)

    columns = [Column("next token", style="bold"), Column("before", "right"), Column("after", "right")]
    output.listing(
        [*columns, Column("change of log p", "right")],
        [[output.token(row["token"]), percent(row["before"]), percent(row["after"]), arrow(row)] for row in moved],
    )
