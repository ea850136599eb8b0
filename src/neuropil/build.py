"""The main job: map every neuron of a model into an atlas, and say what came of it.

```python
from neuropil.build import build_atlas
from neuropil.models import load

summary = build_atlas(load("smollm2"), "atlases/smollm2")
print(summary.neurons, summary.specialised, summary.confirmed)
```

The work is two groups of columns: `decode` (what each neuron's weights stand for) and `causal` (whether
clamping the neuron moves the tokens it stands for). Each is computed site by site; a site that is on disk
already is not computed again, so a stopped run goes on where it was.

A vision model has no tokens. It is shown a probe of images instead, and the groups are `activity`, `exemplars` and
`ablation` (`neuropil.vision`); the images are kept in the atlas.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuropil.errors import AtlasError, ModelError, NeuropilError

if TYPE_CHECKING:
    from neuropil.atlas import Atlas
    from neuropil.data import Probe
    from neuropil.models import Model
    from neuropil.neurons import Site

ROLES = ("up", "gate", "down")
DIAGRAM = "diagram.json"  # in the folder of an atlas


@dataclass(frozen=True)
class Summary:
    """What an atlas holds, in numbers. `None` where the group that would tell was not computed."""

    path: str
    model: str
    neurons: int
    sites: int
    specialised: int | None
    confirmed: int | None  # neurons whose clamp moves their own label's tokens, either way
    promotes: int | None
    suppresses: int | None
    confirmed_specialised: int | None  # of the specialised neurons, those confirmed
    size: int  # bytes on disk
    seconds: float | None = None  # the time this run took
    images: int | None = None  # of a vision model: how many it was shown
    dead: int | None = None  # neurons that say the same of every place of every image
    selective: int | None = None  # neurons that one class drives three times as much as the others together
    ablated: int | None = None  # neurons that were silenced

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_path(model: Model) -> Path:
    """`atlases/<model name>`: the last part of its path or hub name, made fit for a folder."""
    name = Path(model.name).resolve().name.removesuffix(".gguf")
    name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in name).strip("-.")
    return Path("atlases") / (name or "model")


def build_atlas(
    model: Model,
    path: str | Path,
    which: Sequence[str] = ROLES,
    top_k: int = 10,
    causal: bool = True,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
    images: str | Path | Probe | None = None,
) -> Summary:
    """Maps every neuron of `model` into the atlas at `path`, or goes on with one that was begun.

    Args:
        which: the weights to decode, of "up", "gate" and "down".
        top_k: tokens kept for each weight.
        causal: whether to clamp (of a vision model: to silence) neurons and measure the effect; by far the longer
            part.
        prompts: the texts on which effects are measured; the built-in ones if None.
        overwrite: compute everything anew, instead of keeping what is there.
        images: what a vision model is shown: "photos", "fashion-mnist", "digits", a folder, or a `Probe` of one's
            own; None takes fashion-mnist for a model of grey images and photos for one of colour. Given for a network
            without convolutions, it says that its numbers are pixels.

    Raises:
        NoNeurons: the model has no MLP.
        ModelError: `images` for a model that takes none, or images of another form.
        AtlasError: the folder holds an atlas of another model or of other settings.
        AtlasBusy: another process is writing to it.
    """
    from neuropil.atlas import Atlas
    from neuropil.interpret.decode import Decoder

    started = time.monotonic()
    if images is not None or model.image_input is not None:
        with _ranks():
            _see(model, Path(path), images, causal, progress, overwrite)
        return summarise(path, seconds=time.monotonic() - started)
    with _ranks(), Atlas.create(path, model) as atlas:
        decoder = Decoder(model, which=tuple(which), top_k=top_k)
        atlas.add(
            "decode",
            decoder.columns,
            settings=decoder.settings,
            method="decode",
            progress=progress,
            overwrite=overwrite,
        )
        if causal:
            columns, settings = _causal(model, atlas, prompts)
            atlas.add(
                "causal",
                columns,
                settings=settings,
                method="causal",
                progress=progress,
                overwrite=overwrite,
            )
    return summarise(path, seconds=time.monotonic() - started)


def _see(
    model: Model, path: Path, images: str | Path | Probe | None, causal: bool, progress: bool, overwrite: bool
) -> None:
    """The groups of a vision model."""
    from neuropil.ablation import Ablation, classifies
    from neuropil.atlas import Atlas
    from neuropil.data.probes import stored_digest
    from neuropil.vision import EXEMPLAR_TYPES, Activity, Exemplars

    model.image_input = model.takes_images
    shown = probe_for(model, images)
    with Atlas.create(path, model) as atlas:
        activity = Activity(model, shown)
        again: dict[str, Any] = {"progress": progress, "overwrite": overwrite}
        atlas.add("activity", activity.columns, settings=activity.settings, method="activity", **again)
        if (
            main_rank() and stored_digest(path) != shown.digest
        ):  # after the settings were found to be those of the images that are there
            shown.save(path)
        exemplars = Exemplars(model, shown)

        def driven(site: Site) -> dict[str, Any]:
            rows = atlas.query("SELECT dead FROM activity WHERE site = ? ORDER BY index", [site.number])
            return exemplars.columns(site, rows["dead"].to_pylist())

        settings = exemplars.settings
        atlas.add("exemplars", driven, settings=settings, method="milan exemplars", types=EXEMPLAR_TYPES, **again)
        if causal and classifies(model, shown):
            ablation = Ablation(model, shown)
            atlas.add("ablation", ablation.columns, settings=ablation.settings, method="ablation", **again)
        if main_rank() and kept_diagram(path, model.fingerprint) is None:
            with contextlib.suppress(
                NeuropilError
            ):  # some models cannot be traced; the neurons are mapped all the same
                keep_diagram(model, path, (int(shown.pixels.shape[2]), int(shown.pixels.shape[3])))


def keep_diagram(model: Model, path: str | Path, size: tuple[int, int] | None = None) -> Any:
    """Traces the model's circuit diagram, keeps it in the atlas at `path` as `diagram.json`, and gives it.

    `size` is that of the images of a vision model that does not settle it.

    Raises DiagramError or ModelError where the model cannot be traced.
    """
    import torch

    from neuropil import _parts
    from neuropil.data.probes import natural
    from neuropil.interpret.diagrams import circuit_diagram
    from neuropil.interpret.diagrams.trace import hidden

    example = None
    if (wanted := model.image_input) is not None:
        size = wanted.fitted(size or natural("photos")).size
        assert size is not None
        example = wanted(torch.zeros(1, wanted.channels, *size, dtype=torch.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an opaque box says so in the drawing
        diagram = hidden(circuit_diagram(model, example).diagram, ("batch",))
    text = json.dumps({"fingerprint": model.fingerprint, "diagram": diagram.to_json()})
    with contextlib.suppress(AtlasError, OSError):  # an atlas that may not be written is read all the same
        _parts.atomic_write(Path(path) / DIAGRAM, text.encode())
    return diagram


def kept_diagram(path: str | Path, fingerprint: str) -> Any:
    """The diagram in the atlas at `path`; None where there is none of this model that can be read."""
    from neuropil.interpret.diagrams import Diagram

    try:
        kept = json.loads((Path(path) / DIAGRAM).read_text(encoding="utf-8"))
        return Diagram.from_json(kept["diagram"]) if kept["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def probe_for(model: Model, images: str | Path | Probe | None) -> Probe:
    """The images that a model is shown, of its own channels and size.

    Raises ModelError for a model that takes no images, MissingAsset where a set is not here.
    """
    from neuropil.data import Probe
    from neuropil.data.probes import natural, probe

    if isinstance(images, Probe):
        return images
    wanted = model.takes_images
    if wanted is None:
        raise ModelError(f"{model.name} ({model.architecture}) takes no images; leave images out (--images)")
    source = images or ("fashion-mnist" if wanted.channels == 1 else "photos")
    size = wanted.fitted(natural(source)).size
    assert size is not None
    return probe(source, wanted.channels, size)


def kept_probe(path: str | Path, model: Model) -> tuple[Probe, bool]:
    """The images in the atlas of a vision model, and whether they are the very ones that it was shown.

    Raises AtlasError where there are none, ModelError for a model that takes none.
    """
    from neuropil.atlas import Atlas
    from neuropil.data.probes import kept, natural

    wanted = model.takes_images
    if wanted is None:
        raise ModelError(f"{model.name} ({model.architecture}) takes no images")
    with Atlas.open(path) as atlas:
        settings = atlas.manifest["groups"].get("activity", {}).get("settings", {})
    high, wide = settings.get("size", (0, *natural("photos")))[-2:]
    size = wanted.fitted((int(high), int(wide))).size
    assert size is not None
    return kept(Path(path), size)


@contextlib.contextmanager
def _ranks() -> Iterator[None]:
    """Under torchrun, joins the processes it started, so that they share the sites out."""
    import torch.distributed as dist

    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available() or dist.is_initialized()
    if alone:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _causal(
    model: Model, atlas: Atlas, prompts: Sequence[str] | None
) -> tuple[Callable[[Site], dict[str, Any]], dict[str, Any]]:
    from neuropil.interpret.causal import CausalCheck

    check = CausalCheck(model, prompts=list(prompts) if prompts else None)

    def columns(site: Site) -> dict[str, Any]:
        labels = "SELECT label_token, label_tokens FROM decode WHERE site = ? ORDER BY index"
        return check.columns(site, atlas.query(labels, [site.number]).to_pydict())

    return columns, check.settings


def main_rank() -> bool:
    """Whether this process speaks for the run: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def summarise(path: str | Path, seconds: float | None = None) -> Summary:
    """The numbers of an atlas that is on disk."""
    from neuropil.atlas import Atlas

    path = Path(path)
    with Atlas.open(path) as atlas:
        columns = set(atlas.columns)
        wanted = ["count(*) AS neurons", "count(DISTINCT site) AS sites"]
        if "specialised" in columns:
            wanted.append("count(*) FILTER (specialised) AS specialised")
        if "verdict" in columns:
            wanted.append("count(*) FILTER (confirmed) AS confirmed")
            wanted.append("count(*) FILTER (verdict = 'promotes') AS promotes")
            wanted.append("count(*) FILTER (verdict = 'suppresses') AS suppresses")
        if {"specialised", "verdict"} <= columns:
            wanted.append("count(*) FILTER (confirmed AND specialised) AS confirmed_specialised")
        if "dead" in columns:
            wanted.append("count(*) FILTER (dead) AS dead")
        if "selectivity" in columns:
            wanted.append("count(*) FILTER (selectivity >= 0.5) AS selective")
        if "ablation" in columns:
            wanted.append("count(ablation) AS ablated")
        counts = atlas.query(f"SELECT {', '.join(wanted)} FROM neurons").to_pylist()[0]
        model = str(atlas.manifest.get("model", {}).get("name", path.name))
        activity = atlas.manifest["groups"].get("activity", {}).get("settings", {})
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    optional = ["specialised", "confirmed", "promotes", "suppresses", "confirmed_specialised"]
    optional += ["dead", "selective", "ablated"]
    return Summary(
        path=str(path),
        model=model,
        neurons=counts["neurons"],
        sites=counts["sites"],
        size=size,
        seconds=seconds,
        images=activity.get("count"),
        **{name: counts.get(name) for name in optional},
    )
