"""`neuropil compress`: a smaller copy of a model, what it cost, and what it did to each neuron."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import ANY_MODEL, AsJson, command, interruptible, told
from neuropil.cli.atlas import load_model, size
from neuropil.cli.output import Column

if TYPE_CHECKING:
    from neuropil.changes import Changes
    from neuropil.data import Probe
    from neuropil.models import Model

WINDOW, CALIBRATION, TEST = 256, 16, 24  # tokens, and windows of them
PIXELS, BATCH = 1 << 22, 1 << 19  # of images to calibrate on, all and at once: the layers' inputs are kept in memory

SETS = 64  # texts or images whose core neurons are told apart, at most


@command(
    "compress",
    "Models",
    "neuropil compress                                         what methods there are",
    "neuropil compress smollm2 --method uniform --bits 8 --out small",
    "neuropil compress smollm2 --method uniform --bits 4 --group 32 --out small4 --atlas atlases/smollm2",
    "neuropil compress efficientnet-lite0 --bits 8            a vision model, tested on photographs",
    "neuropil compress ./my-swin --method adaround --images ./pictures --out rounded",
    "neuropil compress ./my-swin --method magnitude --sparsity 0.7 --out pruned --no-evaluate",
)
def compress(
    model: Annotated[
        str | None,
        typer.Argument(help=ANY_MODEL, show_default="list methods"),
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="How; without MODEL, all are listed.")] = "uniform",
    bits: Annotated[int | None, typer.Option(help="Bits a weight.", show_default="the method's")] = None,
    group: Annotated[
        int | None, typer.Option(help="Weights that share a scale; of convolutions, at most.", show_default="a channel")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights or neurons that go.", show_default="0.5")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers to leave: a name, or a pattern with *.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder for the small model.", show_default="write none")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Quality and rate, before and after.")
    ] = True,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="What a vision model is shown to calibrate and test: photos, fashion-mnist, digits, or a folder.",
            show_default="by its channels",
        ),
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option(metavar="ATLAS", help="Add what it does to each neuron to this atlas of MODEL.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make MODEL smaller and say what that costs: bytes, quality, rate.

    A language model is tested by its perplexity on text and its tokens a second; a vision model by how many images it
    puts into the same class as before, how far its probabilities moved (KL divergence) and its images a second. Every
    other image (of photographs: every other one with all its crops) serves for calibration, the rest for the test.

    The model that is given is never changed. The folder that is written loads wherever a model does; of a model without
    a config.json, into a module like it.
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
    if images is not None and loaded.takes_images is None:
        raise typer.BadParameter(f"{model} takes no images: --images is of vision models.", param_hint="--images")
    data = _data(loaded, images, wanted) if evaluate or wanted else None
    settings: dict[str, Any] = {"bits": bits, "group": group, "sparsity": sparsity, "skip": tuple(skip or ())}
    calibration = data[0] if data is not None and wanted else None
    try:
        with interruptible(lambda: "Stopped; nothing was written."):
            given: dict[str, Any] = {"calibration": calibration, "example": _example(loaded), "progress": True}
            changes = recipes.compress(whole, method, **given, **settings)
    except ValueError as error:
        raise told(error) from error
    facts = _facts(loaded, changes, method)
    if data is not None and evaluate:
        with interruptible(lambda: "Stopped while measuring; nothing was written."):
            facts |= data[1](whole, changes.model)
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
    output.as_json(facts) if as_json else _show(facts, changes, loaded)


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

    from neuropil.data.probes import natural
    from neuropil.errors import ModelError

    config = loaded.config
    if loaded.image_input is not None:
        try:
            wanted = loaded.image_input.fitted(natural("photos"))
        except ModelError:
            return None
        return wanted(torch.zeros(1, wanted.channels, *(wanted.size or ()), dtype=torch.uint8))
    if getattr(config, "vocab_size", None):
        return {"input_ids": torch.arange(8)[None] % config.vocab_size, "use_cache": False}
    return None


Measure = Callable[[Any, Any], dict[str, Any]]  # of the model before and after


def _data(loaded: Model, images: str | None, calibrates: bool) -> tuple[list[Any], Measure] | None:
    """Inputs for calibration, and how the rest measures two models; None where there are no data for the model."""
    if images is not None or loaded.image_input is not None:
        return _images(loaded, images, calibrates)
    return _texts(loaded)


def _images(loaded: Model, images: str | None, calibrates: bool) -> tuple[list[Any], Measure] | None:
    from neuropil.build import probe_for
    from neuropil.data.probes import spaced
    from neuropil.errors import MissingAsset, ModelError
    from neuropil.vision import inputs

    try:
        shown = probe_for(loaded, images)
        calibration, test = shown.halves()
        _tried(loaded, test)
    except (ModelError, ValueError) as error:
        if images is not None and not isinstance(error, MissingAsset):
            raise told(error) from error
        output.note(f"no images to measure on: {error}")
        return None
    most = max(1, PIXELS // calibration.pixels[0, 0].numel())
    calibration = calibration.part(spaced(len(calibration), most))
    share = f"{len(calibration)} to calibrate, " if calibrates else ""
    output.note(f"images of {shown.name}: {share}{len(test)} to test")
    about = {"images": shown.name, **({"calibration_images": len(calibration)} if calibrates else {})}
    batches = inputs(loaded, calibration, BATCH) if calibrates else []
    return batches, partial(_seen, loaded, test, about)


def _tried(loaded: Model, images: Probe) -> None:
    """Raises ModelError where the model wants more than images, or answers with what cannot be compared."""
    from neuropil.errors import ModelError
    from neuropil.evaluate import likeness
    from neuropil.vision import inputs

    whole = loaded.module()
    try:
        likeness(whole, whole, inputs(loaded, images.part([0])))
    except Exception as error:  # any module may refuse in its own way
        raise ModelError(f"{loaded.name} cannot be run on images alone ({error})") from error


def _texts(loaded: Model) -> tuple[list[Any], Measure] | None:
    """Windows of text for calibration and for testing; None for a model that reads no text."""
    from neuropil import data
    from neuropil.errors import MissingAsset
    from neuropil.evaluate import windows

    if not _is_language(loaded):
        output.note("the model reads no text and takes no images, so its quality is not measured here")
        return None
    try:
        texts = data.text()
    except MissingAsset as error:
        output.note(f"no text to measure on: {error}")
        return None
    train = windows(texts.train, loaded.tokenizer, WINDOW, limit=CALIBRATION)
    return train, partial(_read, windows(texts.test, loaded.tokenizer, WINDOW, limit=TEST))


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


def _seen(loaded: Model, test: Probe, about: dict[str, Any], before: Any, after: Any) -> dict[str, Any]:
    """Answers to held-out images, and images a second: both models in float32, packed weights as they are."""
    from neuropil.evaluate import image_rate, likeness
    from neuropil.vision import inputs

    batches = inputs(loaded, test)
    output.note("measuring …")
    found = likeness(before, after, batches, test.labels, len(test.classes))
    facts: dict[str, Any] = {**about, "test_images": found.images}
    if found.agreement is None:
        facts |= {"output_error": found.error, "output_cosine": found.cosine}
    else:
        facts |= {"agreement": found.agreement, "kl": found.kl}
    if found.accuracy is not None:
        facts["accuracy_before"], facts["accuracy_after"] = found.accuracy
    rates = {"before": 0.0, "after": 0.0}
    for _ in range(3):  # in turn, so that what else the machine does falls on both
        for name, net in (("before", before), ("after", after)):
            rates[name] = max(rates[name], image_rate(net, batches[0], repeats=2))
    return facts | {f"images_per_second_{name}": rate for name, rate in rates.items()}


def _read(test: list[Any], before: Any, after: Any) -> dict[str, Any]:
    """Perplexity on held-out text and greedy generation: float32 before, bfloat16 after where weights are packed."""
    import torch

    from neuropil.evaluate import generation_rate, perplexity

    facts: dict[str, Any] = {}
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

    share = SPARSITY if settings["sparsity"] is None else settings["sparsity"]
    given = settings["bits"] if settings["bits"] is not None else settings["sparsity"]
    if method == "neurons":  # by itself that is the name of the atlas's table
        given = share
    prefix = method if given is None else f"{method}{given}".replace("0.", "0")
    if method == "core":
        each = [row for batch in calibration for row in batch.split(1)]  # one text or image
        each = each[:: -(-len(each) // SETS)]
        columns: Any = core_columns(loaded.module(), each, 1 - share, prefix)
    elif method == "neurons":
        columns = importance_columns(neuron_scores(loaded.module(), calibration), share, prefix)
    else:
        columns = compression_columns(loaded, changes.model, prefix)
    with Atlas.create(path, loaded) as atlas:
        kept = {name: value for name, value in settings.items() if value}
        atlas.add(prefix, columns, settings=kept, method=f"compress.{method}", overwrite=True)
        return [name for name in atlas.columns if name.startswith(f"{prefix}_")]


def _show(facts: dict[str, Any], changes: Changes, loaded: Model) -> None:
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
    if "test_images" in facts:
        lines |= _shown_images(facts)
    if "columns" in facts:
        lines["columns"] = ", ".join(facts["columns"])
    if "written" in facts:
        lines["written"] = _written(Path(facts["written"]), loaded)
    output.pairs(lines)


def _shown_images(facts: dict[str, Any]) -> dict[str, str]:
    """What the images told."""
    count = output.plural(facts["test_images"], "image")
    lines = {}
    if "agreement" in facts:
        lines["same class"] = f"{facts['agreement']:.1%} of {count} of {facts['images']}"
        lines["divergence"] = f"{facts['kl']:.3g} nats an image from the probabilities of before"
    else:
        lines["outputs"] = (
            f"{facts['output_error']:.1%} off, cosine {facts['output_cosine']:.4f} on {count} of {facts['images']}"
        )
    if "accuracy_before" in facts:
        lines["accuracy"] = f"{facts['accuracy_before']:.1%} → {facts['accuracy_after']:.1%}"
    before, after = facts["images_per_second_before"], facts["images_per_second_after"]
    lines["rate"] = f"{after / before:.2f} times that of before ({before:.1f} → {after:.1f} images a second)"
    return lines


def _written(out: Path, loaded: Model) -> str:
    """Where the small model is, and how it is loaded: without a config.json into a module of the original's kind."""
    if (out / "config.json").is_file():
        return f"{out}: neuropil.models.load({str(out)!r})"
    module = f"neuropil.models.load({(loaded.source or loaded.name)!r}).module()"
    return f"{out}: neuropil.models.load_packed({str(out)!r}, into={module})"


def _left(changes: Changes) -> str:
    reasons = output.by_reason({name or "the model": why for name, why in changes.left.items()})
    return "".join(f"; {len(names)} left ({output.first(names)}: {why})" for why, names in reasons.items())
