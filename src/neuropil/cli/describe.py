"""`neuropil describe`: what drives the units of a vision model, in sentences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neuropil.cli import output
from neuropil.cli.app import AsJson, command, interruptible
from neuropil.cli.atlas import load_model
from neuropil.cli.output import Column
from neuropil.errors import ModelError, NeuropilError

if TYPE_CHECKING:
    from neuropil.data import Probe
    from neuropil.interpret.milan import MILAN, Description, ExemplarSet
    from neuropil.interpret.milan.sheet import Shown
    from neuropil.models import Model
    from neuropil.neurons import Site

SHOWN = 12


@command(
    "describe",
    "Models",
    "neuropil describe ./my-vit ./photos --layer 3 --out units.csv",
    "neuropil describe ./my-resnet ./photos --out units.csv     every layer, and a page of pictures",
    "neuropil describe ./my-vit --atlas atlases/my-vit           of the atlas's own images, into it",
    "neuropil describe ./my-cnn fashion-mnist --out units.csv",
    "neuropil describe ./my-vit ./photos --captioner mine --encoder ./my-resnet",
)
def describe(
    model: Annotated[str, typer.Argument(help="A vision model: a Hugging Face folder or name, or FILE.py:NAME.")],
    images: Annotated[
        str | None,
        typer.Argument(
            help="A folder of pictures, or one of photos, fashion-mnist, digits.", show_default="those of ATLAS"
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", "-l", help="A site's number or name, or a module's name.", show_default="all sites"),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Pictures a unit.")] = 15,
    quantile: Annotated[float, typer.Option(help="Of a unit's activations, above which its region is.")] = 0.99,
    lam: Annotated[float, typer.Option(min=0, help="How much the usual is held against a sentence.")] = 0.2,
    beam: Annotated[int, typer.Option(min=1, help="Sentences tried.")] = 50,
    captioner: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="A folder of MILAN.save.", show_default="one of generated scenes"
        ),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The network that the captioner sees with.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.csv", help="A table, and a page beside it (.html).")
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option(metavar="ATLAS", help="Add the descriptions to this atlas of MODEL.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Describe anew what ATLAS already has.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say in a sentence which regions of IMAGES drive each unit of MODEL.

    The captioner that is there by itself learned from generated scenes: it knows colours, textures, shapes, sizes and
    letters, and of photographs says which of these they remind it of. It is trained in a minute or two when first
    used, and kept in the cache. Into an atlas, each layer is written when it is described: a run that was stopped goes
    on where it was.
    """
    if images is None and atlas is None:
        raise typer.BadParameter("give pictures, or an atlas that holds some (--atlas).", param_hint="IMAGES")
    if atlas is not None:
        from neuropil.atlas import Atlas

        Atlas.open(atlas).close()  # it must be there, which is asked before the work
    loaded = load_model(model)
    layers = _layers(loaded, layer)
    if atlas is not None:
        _fits(atlas, loaded, layers)
    shown, whole = _shown(loaded, images, atlas)
    origin = {"images": Path(str(images)).name, "count": len(shown)} if whole is None else whole.settings
    milan = _captioner(captioner, encoder).set_params(lam=lam, beam=beam)
    from neuropil.interpret.milan import exemplars
    from neuropil.vision import Exemplars

    together = None if whole is None else Exemplars(loaded, whole, k, quantile=quantile)

    def found(each: str | Site) -> tuple[ExemplarSet, list[Description]]:
        output.note(f"{each if isinstance(each, str) else each.name}: {output.plural(len(shown), 'picture')} …")
        if isinstance(each, str) or together is None:
            regions = exemplars(loaded.module(), shown, each, k=k, quantile=quantile, show=shown.show)
        else:
            regions = together.found(each)
        texts = milan.describe(regions)
        return (regions if out is not None else _bare(regions)), texts

    settings = origin | {
        "k": k,
        "quantile": quantile,
        "lam": lam,
        "beam": beam,
        "captioner": str(captioner or "scenes"),
    }
    described: list[tuple[ExemplarSet, list[Description]]] = []
    if atlas is None or out is not None:  # a page shows pictures, which an atlas does not keep
        with interruptible(lambda: "Stopped; nothing was written."):
            described = [found(each) for each in layers]
    facts: dict[str, Any] = {
        "model": loaded.name, "images": origin["images"], "pictures": len(shown),
        "captioner": str(captioner or "generated scenes"),
    }  # fmt: skip
    if out is not None:
        facts["written"] = _written(out, described, shown, loaded.name)
    if atlas is not None:
        ready = {regions.layer: (regions, texts) for regions, texts in described}
        facts |= _kept(atlas, loaded, layers, lambda site: ready.get(site.name) or found(site), settings, overwrite)
    else:
        facts["units"] = [fact for regions, texts in described for fact in _facts(regions, texts)]
    output.as_json(facts) if as_json else _show(facts)


def _layers(loaded: Model, names: list[str] | None) -> list[str | Site]:
    """Sites by number or name, anything else as the name of a module (which is looked for later)."""
    if not names:
        return list(loaded.sites)
    by_name = {site.name: site for site in loaded.sites} | {str(site.number): site for site in loaded.sites}
    return [by_name.get(name, name) for name in names]


def _fits(path: Path, loaded: Model, layers: list[str | Site]) -> None:
    """Asked before the work: whether the descriptions may be put into the atlas."""
    from neuropil.atlas import Atlas

    if others := [each for each in layers if isinstance(each, str)]:
        raise NeuropilError(f"an atlas holds sites alone, and {others[0]!r} is none; give a site's number or name")
    Atlas.create(path, loaded).close()  # raises where it is of another model


def _shown(loaded: Model, images: str | None, atlas: Path | None) -> tuple[Shown, Probe | None]:
    """The pictures as the model wants them, and those of a set or an atlas as a probe; a folder's may be too many."""
    from neuropil.build import kept_probe, probe_for
    from neuropil.data.images import SETS
    from neuropil.interpret.milan.sheet import Pictures, Shown
    from neuropil.vision import prepared

    if images is not None and images not in ("photos", *SETS):
        folder = Path(images).expanduser()
        if not folder.is_dir():
            expected = ", ".join(("photos", *SETS))
            raise typer.BadParameter(
                f"{images} is no folder; give one of pictures, or {expected}.", param_hint="IMAGES"
            )
        wanted = loaded.takes_images
        if wanted is None:
            raise ModelError(f"{loaded.name} ({loaded.architecture}) takes no images, so none drive its units")
        wanted = wanted.fitted((224, 224))
        assert wanted.size is not None
        pictures = Pictures(folder, wanted.size, wanted.channels)
        return Shown(pictures, pictures.names, wanted), None
    if images is not None:
        probe = probe_for(loaded, images)
    else:
        assert atlas is not None
        probe, same = kept_probe(atlas, loaded)
        if not same:
            output.note(f"{atlas} keeps its images small, and they are enlarged; give IMAGES to see them in full")
    return Shown(probe.pixels, probe.names, prepared(loaded, probe)), probe


def _bare(found: ExemplarSet) -> ExemplarSet:
    """Without pictures and maps, of which those of all layers together may be too many."""
    return replace(found, maps=found.maps[..., :1, :1], stored=found.stored[:0], stored_ids=found.stored_ids[:0])


def _captioner(folder: Path | None, encoder: str | None) -> MILAN:
    from neuropil.interpret.milan import MILAN, scene_captioner

    if folder is not None and encoder is not None:
        return MILAN.load(folder, load_model(encoder).module())
    if folder is not None and not (folder / "encoder.safetensors").is_file():
        raise NeuropilError(f"{folder} holds no network to see with; name the one it was trained with by --encoder")
    if folder is None:
        output.note("the captioner of generated scenes (trained once, in a minute or two) …")
    with interruptible(lambda: "Stopped while the captioner learned; nothing was kept."):
        return scene_captioner(folder)


def _facts(found: ExemplarSet, texts: list[Description]) -> list[dict[str, Any]]:
    rows = zip(found.units.tolist(), found.dead.tolist(), texts, strict=True)
    return [
        {
            "layer": found.layer,
            "unit": u,
            "dead": d,
            "description": t.text,
            "score": None if d else t.score,
        }
        for u, d, t in rows
    ]


def _written(out: Path, described: list[tuple[ExemplarSet, list[Description]]], probe: Shown, title: str) -> list[str]:
    from neuropil.interpret.milan.sheet import write_sheet, write_table

    page = write_sheet(out.with_suffix(".html"), described, title)
    return [str(write_table(out, described, probe.names)), str(page)]


def _kept(
    path: Path,
    loaded: Model,
    layers: list[Any],
    describe: Callable[[Site], tuple[ExemplarSet, list[Description]]],
    settings: dict[str, Any],
    overwrite: bool,
) -> dict[str, Any]:
    """Describe, a layer at a time, what the atlas lacks; gives what it then says of these layers."""
    from neuropil.atlas import Atlas
    from neuropil.interpret.milan import as_columns

    def described() -> int:
        return sum(1 for _ in (path / "parts" / "milan").glob("*.parquet"))

    with (
        Atlas.create(path, loaded) as atlas,
        interruptible(
            lambda: f"Stopped. {path} keeps {output.plural(described(), 'layer')}; the same command goes on."
        ),
    ):
        written = atlas.add(
            "milan", lambda site: as_columns(*describe(site)), settings=settings, method="interpret.milan",
            sites=layers, progress=False, overwrite=overwrite,
        )  # fmt: skip
        if written < len(layers):
            output.note(f"{path} had {output.plural(len(layers) - written, 'layer')} of {len(layers)} described")
        rows = atlas.query(
            "SELECT neurons.module AS layer, m.index AS unit, m.dead, m.description, m.description_score AS score "
            "FROM milan AS m JOIN neurons USING (site, index) WHERE list_contains($sites, m.site) "
            "ORDER BY m.site, unit",
            {"sites": [site.number for site in layers]},
        ).to_pylist()
        names = ("description", "description_score", "dead")  # the last is there already where activity is
        return {
            "units": rows,
            "columns": [f"milan_{name}" if f"milan_{name}" in atlas.columns else name for name in names],
        }


def _show(facts: dict[str, Any]) -> None:
    units = facts["units"]
    alive = sorted((u for u in units if not u["dead"]), key=lambda u: -u["score"])
    rows = [[u["layer"], str(u["unit"]), u["description"], f"{u['score']:.2f}"] for u in alive[:SHOWN]]
    output.listing([Column("layer"), Column("unit"), Column("description", give=True), Column("score")], rows)
    lines = {"units": f"{len(units)} described from {facts['pictures']} pictures, {len(units) - len(alive)} dead"}
    if "written" in facts:
        lines["written"] = ", ".join(facts["written"])
    if "columns" in facts:
        lines["columns"] = ", ".join(facts["columns"])
    output.pairs(lines)
