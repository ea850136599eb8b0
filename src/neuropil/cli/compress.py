"""`neuropil compress`: a smaller copy of a model, what it cost, and what it did to each neuron."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import ANY_MODEL, AsJson, command, interruptible
from neuropil.cli.atlas import load_model, size
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.changes import Changes
    from neuropil.models import Model

WINDOW, CALIBRATION, TEST = 256, 16, 24  # tokens, and windows of them


@command(
    "compress",
    "Models",
    "neuropil compress                                         what methods there are",
    "neuropil compress smollm2 --method uniform --bits 8 --out small",
    "neuropil compress smollm2 --method uniform --bits 4 --group 32 --out small4 --atlas atlases/smollm2",
    "neuropil compress ./my-swin --method magnitude --sparsity 0.7 --out pruned --no-evaluate",
)
def compress(
    model: Annotated[
        str | None,
        typer.Argument(help=ANY_MODEL, show_default="list methods"),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="How; without MODEL, all are listed.")] = "uniform",
    bits: Annotated[int | None, typer.Option(help="Bits a weight.", show_default="the method's")] = None,
    group: Annotated[int | None, typer.Option(help="Weights that share a scale.", show_default="a channel")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights or neurons that go.", show_default="0.5")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave: a name, or a pattern with *.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for the small model.", show_default="write none")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Perplexity and rate, before and after.")
    ] = True,
    atlas: Annotated[
        Path | None, typer.Option(metavar="ATLAS", help="Add what it does to each neuron to this atlas of MODEL.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make MODEL smaller and say what that costs: bytes, perplexity, tokens a second.

    The model that is given is never changed. The folder that is written loads wherever a model does (of a network of
    your own: with `neuropil.models.load_packed`, into one that you make).
    """
    from neuropil.compress import recipes

    if model is None:
        return _listed(as_json)
    if method not in recipes.RECIPES:
        raise typer.BadParameter(f"got {method!r}; there are {', '.join(recipes.RECIPES)}.", param_hint="--method")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} exists and is not empty; choose another folder.", param_hint="--out")
    if atlas is not None:
        from neuropil.atlas import Atlas

        Atlas.open(atlas).close()  # it must be there, which is asked before the work: here none is begun
    loaded = load_model(model)
    whole = loaded.module()
    wanted = recipes.RECIPES[method].data != "none"
    data = _data(loaded) if evaluate or wanted else None
    settings: dict[str, Any] = {"bits": bits, "group": group, "sparsity": sparsity, "skip": tuple(skip or ())}
    calibration = data[0] if data is not None and wanted else None
    try:
        with interruptible(lambda: "Stopped; nothing was written."):
            changes = recipes.compress(whole, method, calibration=calibration, example=_example(loaded), **settings)
    except ValueError as error:
        raise _said(error) from error
    facts = _facts(loaded, changes, method)
    if data is not None and evaluate:
        facts |= _measured(whole, changes.model, data[1])
    if out is not None:
        from neuropil.models import save_packed

        about = {
            "method": method,
            **{k: v for k, v in settings.items() if v},
            "source": loaded.name,
            "fingerprint": loaded.fingerprint,
        }
        facts["written"] = str(save_packed(changes.model, out, tokenizer=loaded.tokenizer, about=about))
    if atlas is not None:
        facts["columns"] = _add_columns(atlas, loaded, changes, method, settings, calibration)
    output.as_json(facts) if as_json else _show(facts, changes, out)


def _said(error: ValueError) -> Exception:
    from neuropil.errors import NeuropilError

    return error if isinstance(error, NeuropilError) else NeuropilError(str(error))


def _listed(as_json: bool) -> None:
    from neuropil.compress.recipes import RECIPES

    if as_json:
        return output.as_json(
            [
                {"method": name, "what": r.what, "takes": list(r.takes), "data": r.data, "paper": r.slug}
                for name, r in RECIPES.items()
            ]
        )
    rows = [[name, " ".join(f"--{t}" for t in r.takes), r.what, r.slug or ""] for name, r in RECIPES.items()]
    output.listing([Column("method"), Column("takes"), Column("what", give=True), Column("paper", give=True)], rows)
    return None


def _is_language(loaded: Model) -> bool:
    return loaded.tokenizer is not None and loaded.architecture.endswith(("ForCausalLM", "LMHeadModel"))


def _example(loaded: Model) -> Any:
    """One input of the model: eight tokens, or a black image."""
    import torch

    config = loaded.config
    if sides := getattr(config, "image_size", None):
        high, wide = (sides, sides) if isinstance(sides, int) else tuple(sides)
        return torch.zeros(1, getattr(config, "num_channels", 3), high, wide)
    if getattr(config, "vocab_size", None):
        return {"input_ids": torch.arange(8)[None] % config.vocab_size, "use_cache": False}
    if (asked := loaded.image_input) is not None:
        asked = asked.fitted((224, 224))
        assert asked.size is not None
        return asked(torch.zeros(1, asked.channels, *asked.size, dtype=torch.uint8))
    return None


def _data(loaded: Model) -> tuple[list[Any], list[Any]] | None:
    """Windows of text for calibration and for testing; None for a model that reads no text."""
    from neuropil import data
    from neuropil.errors import MissingAsset
    from neuropil.evaluate import windows

    if not _is_language(loaded):
        output.note("the model reads no text, so its quality is not measured here")
        return None
    try:
        texts = data.text()
    except MissingAsset as error:
        output.note(f"no text to measure on: {error}")
        return None
    train = windows(texts.train, loaded.tokenizer, WINDOW, limit=CALIBRATION)
    return train, windows(texts.test, loaded.tokenizer, WINDOW, limit=TEST)


def _facts(loaded: Model, changes: Changes, method: str) -> dict[str, Any]:
    from neuropil.packed import nbytes, packed_modules

    seen: dict[int, Any] = {id(packing): packing for _, _, packing in packed_modules(changes.model)}
    weights = sum(packing.shape.numel() for packing in seen.values())
    kept = sum(nbytes(packing) for packing in seen.values())
    return {
        "model": loaded.name,
        "method": method,
        "changed": len(changes.changed),
        "left": dict(changes.left),
        "bytes": nbytes(changes.model),
        "bytes_float32": 4 * loaded.parameters,
        "packed_weights": weights,
        "packed_bytes": kept,
        "bits_a_weight": 8 * kept / weights if weights else None,
    }


def _measured(before: Any, after: Any, test: list[Any]) -> dict[str, Any]:
    """Perplexity on held-out text and greedy generation: float32 before, bfloat16 after where weights are packed."""
    import torch

    from neuropil.evaluate import generation_rate, perplexity

    facts: dict[str, Any] = {}
    with interruptible(lambda: "Stopped while measuring; nothing was written."):
        for name, net in (("before", before), ("after", after)):
            output.note(f"measuring {name} …")
            facts[f"perplexity_{name}"] = perplexity(net, test).value
        prompt = test[0][:, :32]
        facts["tokens_per_second_before"] = generation_rate(before, prompt)
        narrow = _narrowed(after, torch.bfloat16)
        facts["tokens_per_second_after"] = generation_rate(narrow, prompt)
    facts["test_tokens"] = sum(window.shape[1] - 1 for window in test)
    return facts


def _narrowed(model: Any, dtype: Any) -> Any:
    import copy

    return copy.deepcopy(model).to(dtype)


def _add_columns(
    path: Path, loaded: Model, changes: Changes, method: str, settings: dict[str, Any], calibration: Any
) -> list[str]:
    from neuropil.atlas import Atlas
    from neuropil.compress.columns import compression_columns, core_columns, importance_columns
    from neuropil.compress.recipes import SPARSITY
    from neuropil.compress.structured import neuron_scores

    given = settings["bits"] if settings["bits"] is not None else settings["sparsity"]
    prefix = method if given is None else f"{method}{given}".replace("0.", "0")
    share = SPARSITY if settings["sparsity"] is None else settings["sparsity"]
    if method == "core":
        columns: Any = core_columns(loaded.module(), calibration, 1 - share, prefix)
    elif method == "neurons":
        columns = importance_columns(neuron_scores(loaded.module(), calibration), share, prefix)
    else:
        columns = compression_columns(loaded, changes.model, prefix)
    with Atlas.create(path, loaded) as atlas:
        kept = {name: value for name, value in settings.items() if value}
        atlas.add(prefix, columns, settings=kept, method=f"compress.{method}", overwrite=True)
        return [name for name in atlas.columns if name.startswith(f"{prefix}_")]


def _show(facts: dict[str, Any], changes: Changes, out: Path | None) -> None:
    ratio = facts["bytes"] / facts["bytes_float32"]
    lines = {
        "layers": f"{facts['changed']} changed{_left(changes)}",
        "size": f"{size(facts['bytes'])} of {size(facts['bytes_float32'])} in float32 ({ratio:.3f})",
    }
    if facts["bits_a_weight"] is not None:
        each = facts["bits_a_weight"]
        lines["weights"] = (
            f"{each:.2f} bits each in {facts['packed_weights']:,} packed weights ({each / 32:.3f} of float32)"
        )
    if "perplexity_before" in facts:
        lines["perplexity"] = (
            f"{facts['perplexity_before']:.2f} → {facts['perplexity_after']:.2f} on {facts['test_tokens']:,} tokens"
        )
        before, after = facts["tokens_per_second_before"], facts["tokens_per_second_after"]
        lines["generation"] = (
            f"{after / before:.2f} times the rate of float32 ({before:.1f} → {after:.1f} tokens a second)"
        )
    if "columns" in facts:
        lines["columns"] = ", ".join(facts["columns"])
    if out is not None:
        alone = (out / "config.json").is_file()  # else the folder does not say what network its weights are of
        call = f"load({str(out)!r})" if alone else f"load_packed({str(out)!r}, into=...)"
        lines["written"] = f"{out}: neuropil.models.{call}"
    output.pairs(lines)


def _left(changes: Changes) -> str:
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, why in changes.left.items():
        reasons[why].append(name or "the model")
    said = [f"{len(names)} left ({names[0]}{' …' if len(names) > 1 else ''}: {why})" for why, names in reasons.items()]
    return "".join(f"; {each}" for each in said)
