"""The harness, on a small real reproduction written into a folder of its own beside the package's."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import neuropil.reproduce as harness
import neuropil.reproduce.figures  # noqa: F401 - imported before a test takes the package apart
from neuropil.papers import UnknownPaper
from neuropil.report import Report, Row
from neuropil.reproduce import ReproductionError, reproduce

# Layer normalisation's own claim in small: what it puts out does not depend on the input's scale.
SOURCE = """
import os, time
from pathlib import Path
import torch
from neuropil.report import Measurement, find
from neuropil.reproduce import runner

CLAIM = "Normalised outputs do not depend on the scale of the input."
RULE = "Holds if the change under a tenfold input is below 0.01 with normalisation and above it without."
PAPER_SAYS = ("invariant (Table 1)",)
SEEDS = {"smoke": (0, 1), "default": (0, 1, 2), "paper": (0, 1, 2, 3)}
SETTINGS = {"smoke": {"width": 16}, "default": {"width": 64}, "paper": {"width": 1024}}
DEVIATIONS = ("random inputs",)

def measure(scale, seed, progress):
    log = Path(os.environ["MEASURE_LOG"])
    with log.open("a") as file:
        file.write(f"{scale} {seed}\\n")
    if os.environ.get("HANG_AT") == str(seed):
        time.sleep(60)
    x = torch.randn(8, SETTINGS[scale]["width"])
    rows = []
    for name in progress.track(["layer norm", "none"], "normalising"):
        norm = torch.nn.LayerNorm(x.shape[-1]) if name == "layer norm" else torch.nn.Identity()
        change = (norm(10 * x) - norm(x)).abs().mean().item()
        rows.append(Measurement(name, "change", change, higher_is_better=False, baseline=name == "none"))
    return rows

def verdict(rows):
    ours, none = find(rows, "layer norm", "change"), find(rows, "none", "change")
    return "holds" if ours.mean < 0.01 < none.mean else "does not hold"

run = runner(__name__)
"""
SLUG, MODULE = "layer-normalization", "neuropil.reproduce.layer_normalization"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reproduction is found first in `tmp_path/modules`; caches and logs are in `tmp_path` too."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "layer_normalization.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # sources here change within a second
    monkeypatch.setattr(harness, "__path__", [str(modules), *harness.__path__])
    monkeypatch.setenv("NEUROPIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEASURE_LOG", str(tmp_path / "log"))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def measured(folder: Path) -> list[str]:
    log = folder / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_a_claim_is_measured_judged_and_written(folder: Path) -> None:
    report = reproduce(SLUG, "default", out=folder / "out")
    assert report.verdict == "holds"
    assert report.seeds == (0, 1, 2)
    assert report.title == "Layer Normalization"
    assert report.settings == {"width": 64}
    assert report.row("none", "change").baseline
    assert report.row("layer norm", "change").seeds == 3
    assert sorted(path.name for path in (folder / "out").iterdir()) == [f"{SLUG}.json", f"{SLUG}.png"]
    assert Report.load(folder / "out" / f"{SLUG}.json") == report
    assert measured(folder) == ["default 0", "default 1", "default 2"]


def test_the_same_run_gives_the_same_numbers_and_the_same_picture(folder: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = reproduce(SLUG, "smoke", out=folder / "a", fresh=True)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left as it was"
    torch.manual_seed(7)
    second = reproduce(SLUG, "smoke", out=folder / "b", fresh=True)
    assert len(measured(folder)) == 4
    assert first.rows == second.rows
    name = f"{SLUG}.smoke.png"
    assert (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()
    assert first.rows[0].values[0] != first.rows[0].values[1], "seeds differ"


def test_scales_never_overwrite_one_another(folder: Path) -> None:
    out = folder / "out"
    reproduce(SLUG, "default", out=out)
    kept = (out / f"{SLUG}.json").read_bytes(), (out / f"{SLUG}.png").read_bytes()
    reproduce(SLUG, "smoke", out=out)
    assert ((out / f"{SLUG}.json").read_bytes(), (out / f"{SLUG}.png").read_bytes()) == kept
    assert (out / f"{SLUG}.smoke.json").exists()


def test_smoke_and_chosen_seeds_stay_out_of_the_docs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = folder / "docs"
    monkeypatch.setattr(harness, "results_folder", lambda: docs)
    reproduce(SLUG, "smoke")
    reproduce(SLUG, "default", seeds=(5,))
    assert not docs.exists()
    assert (folder / "cache" / "reproduce" / "results" / f"{SLUG}.smoke.json").exists()
    reproduce(SLUG, "default")
    assert sorted(path.name for path in docs.iterdir()) == [f"{SLUG}.json", f"{SLUG}.png"]


def test_a_finished_seed_is_not_measured_again_unless_asked(folder: Path) -> None:
    first = reproduce(SLUG, "smoke", out=folder / "out")
    assert reproduce(SLUG, "smoke", seeds=(1, 2), out=folder / "out").rows[0].values[0] == first.rows[0].values[1]
    assert measured(folder) == ["smoke 0", "smoke 1", "smoke 2"]
    reproduce(SLUG, "smoke", out=folder / "out", fresh=True)
    assert measured(folder)[3:] == ["smoke 0", "smoke 1"]


def test_changed_code_is_measured_again(folder: Path) -> None:
    reproduce(SLUG, "smoke", out=folder / "out")
    source = folder / "modules" / "layer_normalization.py"
    source.write_text(SOURCE.replace("10 * x", "20 * x"))
    sys.modules.pop(MODULE)
    reproduce(SLUG, "smoke", out=folder / "out")
    assert len(measured(folder)) == 4


def test_a_damaged_seed_file_is_measured_again(folder: Path) -> None:
    first = reproduce(SLUG, "smoke", out=folder / "out")
    kept = sorted((folder / "cache" / "reproduce" / SLUG / "smoke").iterdir())
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-20])
    assert reproduce(SLUG, "smoke", out=folder / "out").rows == first.rows
    assert len(measured(folder)) == 3


def test_a_killed_run_goes_on_where_it_was(folder: Path) -> None:
    """SIGKILL while seed 1 is measured; the second run measures seed 1 alone."""
    code = f"""
        import neuropil.reproduce as harness
        harness.__path__.insert(0, {str(folder / "modules")!r})
        harness.reproduce({SLUG!r}, "smoke", out={str(folder / "out")!r})
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {
        "NEUROPIL_CACHE": str(folder / "cache"),
        "MEASURE_LOG": str(folder / "log"),
        "HANG_AT": "1",
    }
    with subprocess.Popen(command, env=environment) as process:
        while measured(folder) != ["smoke 0", "smoke 1"]:
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (folder / "out").exists()
    report = reproduce(SLUG, "smoke", out=folder / "out")
    assert measured(folder) == ["smoke 0", "smoke 1", "smoke 1"]
    assert report.rows == reproduce(SLUG, "smoke", out=folder / "out", fresh=True).rows


def test_run_measures_one_seed_and_writes_nothing(folder: Path) -> None:
    module = harness.load(SLUG).module
    one = module.run("smoke", 1)
    assert one.seeds == (1,)
    assert module.run("smoke").seeds == (0, 1)
    assert one.rows[0].values[0] == module.run("smoke").rows[0].values[1]
    assert not (folder / "cache").exists()


def test_a_verdict_is_a_function_of_the_rows_alone(folder: Path) -> None:
    verdict = harness.load(SLUG).module.verdict
    rows = [Row.of("layer norm", "change", [0.001]), Row.of("none", "change", [3.0])]
    assert verdict(rows) == "holds"
    assert verdict([Row.of("layer norm", "change", [1.0]), rows[1]]) == "does not hold"


def test_a_reproduction_may_draw_its_own_figure(folder: Path) -> None:
    source = folder / "modules" / "layer_normalization.py"
    own = "\ndef figure(report):\n    from matplotlib.figure import Figure\n    return Figure((1, 1))\n"
    report = reproduce(SLUG, "smoke", out=folder / "out")
    common = harness.figure_of(report)
    source.write_text(SOURCE + own)
    sys.modules.pop(MODULE)
    assert common.startswith(b"\x89PNG")
    assert harness.figure_of(report).startswith(b"\x89PNG")
    assert harness.figure_of(report) != common
    assert b"matplotlib" not in common.lower(), "no program name or date in the file"


def test_all_goes_on_after_a_broken_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "neuropil.reproduce.bone", raising=False)  # another test may have it loaded
    broken = SOURCE.replace("def measure(scale, seed, progress):", "def measure(scale, seed, progress):\n    1 / 0")
    (folder / "modules" / "bone.py").write_text(broken)
    harness.__path__[:] = harness.__path__[:1]  # these two alone
    assert harness.available() == ["bone", SLUG]
    outcomes = dict(harness.run_all("smoke", out=folder / "out"))
    sys.modules.pop("neuropil.reproduce.bone")
    assert isinstance(outcomes["bone"], ZeroDivisionError)
    assert isinstance(outcomes[SLUG], Report)


@pytest.mark.parametrize("part", ["CLAIM", "RULE", "PAPER_SAYS", "SEEDS", "SETTINGS", "measure", "verdict", "run"])
def test_what_a_reproduction_lacks_is_named(folder: Path, part: str) -> None:
    (folder / "modules" / "layer_normalization.py").write_text(SOURCE + f"\ndel {part}\n")
    with pytest.raises(ReproductionError, match=part):
        harness.load(SLUG)


def test_bad_requests_are_refused(folder: Path) -> None:
    with pytest.raises(UnknownPaper, match="layer-normalization"):
        reproduce("layer-norm")
    with pytest.raises(ReproductionError, match="fisbe"):
        reproduce("fisbe")
    with pytest.raises(ReproductionError, match="each once"):
        reproduce(SLUG, "smoke", seeds=(1, 1))
    with pytest.raises(ReproductionError, match="each once"):
        reproduce(SLUG, "smoke", seeds=())
    (folder / "modules" / "layer_normalization.py").write_text(SOURCE.replace('"paper": (0, 1, 2, 3)', ""))
    sys.modules.pop(MODULE)
    with pytest.raises(ReproductionError, match=r"SEEDS lacks the scale paper"):
        harness.load(SLUG)


@pytest.mark.parametrize("slug", harness.available())
def test_every_reproduction_keeps_the_convention(slug: str) -> None:
    reproduction = harness.load(slug)
    assert reproduction.module.CLAIM.endswith(".")
    assert reproduction.module.RULE.endswith(".")
    assert len(reproduction.seeds("default")) > 1, "a spread needs several seeds"
