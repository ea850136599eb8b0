"""The command line: what it says, where it says it, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from atlas_factory import tiny_atlas
from typer.testing import CliRunner

from neuropil.atlas import Atlas
from neuropil.cli import app, docs
from neuropil.cli.app import ORDER

WORDS = "dog dogs cat cats sun moon king queen red green river water bank money tree the a is of"


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer, as `save_pretrained` leaves it."""
    return save(tmp_path_factory.mktemp("models") / "tiny", layers=3)


@pytest.fixture(scope="session")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_atlas(tmp_path_factory.mktemp("atlases") / "one")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_atlas(tmp_path_factory.mktemp("atlases") / "two", seed=1)


def save(path: Path, layers: int, spoil: float | None = None) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=1,
    )
    net = LlamaForCausalLM(config)
    if spoil is not None:
        with torch.no_grad():
            net.model.layers[1].mlp.up_proj.weight[3, 2] = spoil
    net.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(path)
    return path


def run(*arguments: object, **settings: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)


def process(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """The real program; one thread, and output as a pipe."""
    settings["env"] = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings.pop("env", {})}
    command = [sys.executable, "-m", "neuropil", *(str(argument) for argument in arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **{**pipes, **settings})


def said_no_traceback(result: Any, code: int) -> str:
    """The error's sentence: on stderr alone, without a traceback, under this exit code."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return str(result.stderr[result.stderr.index("error: ") :])


# ------------------------------------------------------------------------------------------------ help


def test_help_needs_none_of_the_heavy_libraries() -> None:
    heavy = ["torch", "transformers", "pyarrow", "duckdb", "numpy", "fastapi", "matplotlib", "sklearn"]
    script = (
        "import sys\nfrom neuropil.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "loaded: []" in done.stdout
    assert "neuropil find atlases/smollm2" in done.stdout


@pytest.mark.parametrize("name", ORDER)
def test_every_command_has_help_with_examples(name: str) -> None:
    result = run(name, "--help", terminal_width=100)
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"neuropil {name}" in result.stdout.split("Examples")[1]


def test_version() -> None:
    from neuropil import __version__

    assert run("--version").stdout == f"neuropil {__version__}\n"


def test_the_page_of_the_documentation_is_what_the_commands_say() -> None:
    page = Path(__file__).parent.parent / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == docs.page(), f"run: python -m neuropil.cli.docs {page}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["find"],
        ["show", "somewhere"],
        ["atlas", "--weights", "up,sideways"],
        ["atlas", "--weights", ","],
        ["atlas", "--top", "0"],
        ["atlas", "--prompts", "/nowhere/prompts.txt"],
        ["clamp", "smollm2", "--prompt", "x"],
        ["clamp", "29:808=hot", "--prompt", "x"],
        ["clamp", "29:808=nan", "--prompt", "x"],
        ["clamp", "29:808=3"],
        ["clamp", "29:808=3", "--prompt", "x", "--where", "gate"],
        ["query", "somewhere"],
        ["law", "guess", "run.csv"],
        ["law", "fit"],
        ["law", "predict", "/nowhere/run.csv", "--schedule", "cosine"],
        ["reproduce", "neuron-decoding", "--all"],
        ["reproduce", "--scale", "huge"],
    ],
)
def test_wrong_calls_end_with_2_and_say_so_on_stderr(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_an_empty_file_of_prompts_is_a_wrong_call(tmp_path: Path) -> None:
    for content in (b"\n  \n", b"\xff\xfe\x00"):
        (tmp_path / "prompts.txt").write_bytes(content)
        result = run("atlas", "--prompts", tmp_path / "prompts.txt")
        assert result.exit_code == 2
        assert "prompt" in result.stderr


# ------------------------------------------------------------------------------------ reading an atlas


def test_find_lists_the_planted_neuron_first(mapped: Path) -> None:
    result = run("find", mapped, "dog")
    head, first, *_ = result.stdout.splitlines()
    assert head.split()[:2] == ["neuron", "label"]
    assert first.split()[:3] == ["0:0", "dog", "token"]
    assert "suppresses" in first


def test_find_as_json_agrees_with_the_atlas(mapped: Path) -> None:
    rows = json.loads(run("find", mapped, "dog", "--limit", 5, "--json").stdout)
    assert len(rows) == 5
    assert rows[0]["neuron"] == "0:0"
    with Atlas.open(mapped) as atlas:
        truth = atlas.neuron("0:0")
    assert rows[0]["effect_se"] == pytest.approx(truth["effect_se"])
    assert rows[0]["cos_down"] == pytest.approx(truth["cos_down"])


def test_find_nothing_is_no_error(mapped: Path) -> None:
    result = run("find", mapped, "zzqqxx")
    assert result.exit_code == 0
    assert json.loads(run("find", mapped, "zzqqxx", "--json").stdout) == []
    assert "zzqqxx" in result.stderr or result.stdout  # by meaning, even this may be near something


def test_show_says_the_label_the_effect_and_the_tokens(mapped: Path) -> None:
    text = run("show", mapped, "0:0").stdout
    with Atlas.open(mapped) as atlas:
        row = atlas.neuron("0:0")
    assert "stands for dog" in text
    assert f"{row['effect']:+.2f} ± {row['effect_se']:.2f}" in text
    for role in ("up", "gate", "down"):
        assert ", ".join(token.strip() or repr(token) for token in row[f"{role}_tokens"])[:8] in text
    assert json.loads(run("show", mapped, "model.layers.0.mlp:0", "--json").stdout)["neuron"] == "0:0"


def test_show_lists_the_columns_of_other_methods(tmp_path: Path) -> None:
    path = tiny_atlas(tmp_path / "atlas")
    with Atlas.open(path, write=True) as atlas:
        atlas.add("bricks", lambda site: {"brick": torch.arange(site.width)}, settings={}, progress=False)
    assert re.search(r"^brick +7$", run("show", path, "1:7").stdout, re.M)


def test_query_prints_aligned_columns_and_json(mapped: Path) -> None:
    sql = "SELECT layer, count(*) n, list(neuron ORDER BY index)[1:2] who FROM neurons GROUP BY 1 ORDER BY 1"
    lines = run("query", mapped, sql).stdout.splitlines()
    assert lines == [
        "layer   n  who",
        "    0  16  0:0, 0:1",
        "    1  16  1:0, 1:1",
        "    2  16  2:0, 2:1",
    ]
    rows = json.loads(run("query", mapped, sql, "--json", "--limit", 1).stdout)
    assert rows == [{"layer": 0, "n": 16, "who": ["0:0", "0:1"]}]


def test_query_json_has_no_nan_and_keeps_columns_of_one_name(mapped: Path) -> None:
    sql = "SELECT 'nan'::FLOAT AS x, 'inf'::FLOAT AS y, 1 AS z, 2 AS z"
    assert json.loads(run("query", mapped, sql, "--json").stdout) == [{"x": None, "y": None, "z": 1, "z_2": 2}]


def test_query_lists_the_columns(mapped: Path) -> None:
    rows = json.loads(run("query", mapped, "--columns", "--json").stdout)
    assert {"column": "specialised", "type": "BOOLEAN"} in rows


def test_nothing_that_was_read_can_act_on_the_terminal(mapped: Path) -> None:
    text = run("query", mapped, "SELECT chr(27) || '[31mred' AS a, '[bold]b[/bold]' AS b, chr(10) AS c").stdout
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text
    assert "[bold]b[/bold]" in text
    assert "\\n" in text


def test_a_pipe_gets_every_column_whole(mapped: Path) -> None:
    done = process("query", mapped, f"SELECT '{'x' * 500}' AS a, repeat('y', 400) AS b", env={"COLUMNS": "40"})
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0
    assert err == ""
    assert out.splitlines()[1] == "x" * 500 + "  " + "y" * 400


def test_diff_agrees_with_the_library(mapped: Path, other: Path) -> None:
    from neuropil.atlas import diff

    with Atlas.open(mapped) as one, Atlas.open(other) as two:
        truth = diff(one, two)
    found = json.loads(run("diff", mapped, other, "--json", "--limit", 3).stdout)
    assert found["same"] == pytest.approx(truth.same)
    assert found["changed_neurons"] == truth.changed.num_rows > 3
    assert len(found["changed"]) == 3
    last = next(line for line in run("diff", mapped, other).stdout.splitlines() if line.startswith("all"))
    assert f"{100 * truth.same['up']:.1f} %" in last


def test_diff_with_itself_finds_no_change(mapped: Path) -> None:
    text = run("diff", mapped, mapped).stdout
    assert "100.0 %" in text
    assert "No neuron changed its label." in text


# ---------------------------------------------------------------------------------------------- errors


def test_a_folder_that_is_no_atlas(tmp_path: Path) -> None:
    for command in (["find", tmp_path, "dog"], ["show", tmp_path, "0:0"], ["explore", tmp_path]):
        assert "no atlas" in said_no_traceback(run(*command), 7)


def test_an_unknown_neuron(mapped: Path, net: Path) -> None:
    assert "0 to 15" in said_no_traceback(run("show", mapped, "0:99"), 6)
    said_no_traceback(run("show", mapped, "cats"), 6)
    assert "0 to 2" in said_no_traceback(run("clamp", net, "7:0=1", "--prompt", "dog"), 6)


def test_sql_that_fails(mapped: Path) -> None:
    assert "labl" in said_no_traceback(run("query", mapped, "SELECT labl FROM neurons"), 9)
    said_no_traceback(run("query", mapped, "DROP TABLE neurons"), 9)


def test_a_truncated_part_is_named(tmp_path: Path) -> None:
    path = tiny_atlas(tmp_path / "atlas")
    part = path / "parts" / "decode" / "00001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    assert "00001.parquet" in said_no_traceback(run("find", path, "dog"), 7)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in said_no_traceback(run("atlas", tmp_path / "nowhere", "--out", tmp_path / "a"), 3)
    assert "no-such/model" in said_no_traceback(run("atlas", "no-such/model", "--out", tmp_path / "a"), 4)


def test_a_corrupt_model_file(tmp_path: Path) -> None:
    path = save(tmp_path / "net", layers=2)
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:2000])
    assert "model.safetensors" in said_no_traceback(run("atlas", path, "--out", tmp_path / "a"), 3)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(12))
    said_no_traceback(run("atlas", tmp_path / "x.gguf", "--out", tmp_path / "b"), 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "net", layers=2, spoil=value)
    said = said_no_traceback(run("atlas", path, "--out", tmp_path / "a", "--no-causal"), 3)
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_a_model_without_mlps(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20)).save_pretrained(tmp_path / "net")
    said_no_traceback(run("atlas", tmp_path / "net", "--out", tmp_path / "a"), 5)


def test_another_process_is_writing(net: Path, tmp_path: Path) -> None:
    from neuropil.models import load

    with Atlas.create(tmp_path / "a", load(net)):
        said = said_no_traceback(run("atlas", net, "--out", tmp_path / "a"), 8)
    assert str(os.getpid()) in said


def test_the_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    for asked in (run("find", tmp_path, "dog", "--debug"), run("--debug", "find", tmp_path, "dog")):
        assert "Traceback" in asked.stderr
        assert asked.exit_code == 7
    assert "Traceback" in run("find", tmp_path, "dog", env={"NEUROPIL_DEBUG": "1"}).stderr
    assert "Traceback" not in run("find", tmp_path, "dog").stderr


# -------------------------------------------------------------------------------------------- building


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("the dog is\n\na king of the\n  the red moon \n")
    return path


def test_atlas_maps_the_model_and_says_what_came_of_it(net: Path, prompts: Path, tmp_path: Path) -> None:
    path = tmp_path / "atlas"
    result = run("atlas", net, "--out", path, "--top", 4, "--prompts", prompts)
    assert result.exit_code == 0, result.stderr
    with Atlas.open(path) as atlas:
        [truth] = atlas.query(
            "SELECT count(*) n, count(*) FILTER (specialised) s, count(*) FILTER (confirmed) c FROM neurons"
        ).to_pylist()
        assert len(atlas.neuron("1:3")["up_tokens"]) == 4
        settings = atlas.manifest["groups"]["causal"]["settings"]
    assert settings["prompts"] == ["the dog is", "a king of the", "the red moon"]
    assert truth["n"] == 72
    assert re.search(r"neurons mapped +72 in 3 layers", result.stdout)
    assert re.search(rf"specialised +{truth['s']} ", result.stdout)
    assert re.search(rf"causally confirmed +{truth['c']} ", result.stdout)
    # The commands it ends with work as they are printed.
    printed = re.findall(r"^  neuropil ((?:find|query) .*)$", result.stdout, re.M)
    assert len(printed) == 2
    for line in printed:
        assert run(*shlex.split(line)).exit_code == 0


def test_atlas_keeps_what_is_there_and_overwrites_only_when_told(net: Path, tmp_path: Path) -> None:
    path = tmp_path / "atlas"
    again = ["atlas", net, "--out", path, "--no-causal", "--json"]
    first = json.loads(run(*again).stdout)
    assert first["neurons"] == 72
    assert first["confirmed"] is None
    written = (path / "parts" / "decode" / "00001.parquet").stat().st_mtime_ns
    assert json.loads(run(*again).stdout)["specialised"] == first["specialised"]
    assert (path / "parts" / "decode" / "00001.parquet").stat().st_mtime_ns == written
    assert "top_k" in said_no_traceback(run(*again, "--top", 5), 7)
    assert json.loads(run(*again, "--top", 5, "--overwrite").stdout)["neurons"] == 72
    with Atlas.open(path) as atlas:
        assert len(atlas.neuron("1:3")["up_tokens"]) == 5


def test_the_weights_asked_for_are_decoded(net: Path, tmp_path: Path) -> None:
    run("atlas", net, "--out", tmp_path / "a", "--no-causal", "--weights", "down")
    with Atlas.open(tmp_path / "a") as atlas:
        assert "down_tokens" in atlas.columns
        assert "up_tokens" not in atlas.columns


def test_the_default_folder_is_named_after_the_model(net: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run("atlas", net, "--no-causal")
    assert (tmp_path / "atlases" / "tiny" / "manifest.json").exists()


def test_ctrl_c_keeps_the_finished_layers_and_the_next_run_goes_on(prompts: Path, tmp_path: Path) -> None:
    deep, path = save(tmp_path / "deep", layers=12), tmp_path / "atlas"
    command = ["atlas", deep, "--out", path, "--prompts", prompts]
    stopped = process(*command)
    wait_for(lambda: len(list((path / "parts" / "causal").glob("*.parquet"))) >= 2, stopped)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    kept = {file.name: file.read_bytes() for file in (path / "parts" / "causal").glob("*.parquet")}
    assert 2 <= len(kept) < 12
    assert f"decode 12, causal {len(kept)}" in err
    # The command that it prints goes on from there, and gives what an unbroken run gives.
    resume = shlex.split(err.splitlines()[-1])
    assert resume[0] == "neuropil"
    assert run(*resume[1:]).exit_code == 0
    assert run(*command[:2], "--out", tmp_path / "whole", "--prompts", prompts).exit_code == 0
    for name, content in kept.items():
        assert (path / "parts" / "causal" / name).read_bytes() == content
    with Atlas.open(path) as one, Atlas.open(tmp_path / "whole") as other:
        sql = "SELECT * FROM neurons ORDER BY site, index"
        assert one.query(sql).equals(other.query(sql))


def wait_for(happened: Any, program: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert program.poll() is None, program.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def test_under_torchrun_one_rank_speaks_and_the_atlas_is_the_same(net: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "neuropil", "atlas", net, "--out", tmp_path / "two", "--no-causal"]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("neurons mapped") == 1
    run("atlas", net, "--out", tmp_path / "one", "--no-causal")
    with Atlas.open(tmp_path / "one") as one, Atlas.open(tmp_path / "two") as two:
        sql = "SELECT * FROM neurons ORDER BY site, index"
        assert one.query(sql).equals(two.query(sql))


# -------------------------------------------------------------------------------------------- streams


def test_a_closed_pipe_ends_quietly(mapped: Path) -> None:
    for more in ([], ["--json"]):
        program = process("query", mapped, "SELECT * FROM range(60000)", *more)
        assert program.stdout is not None
        program.stdout.readline()
        program.stdout.close()
        assert program.wait(timeout=60) == 141
        assert program.stderr is not None
        assert program.stderr.read() == ""


def test_json_stands_alone_on_stdout(net: Path, tmp_path: Path) -> None:
    program = process("atlas", net, "--out", tmp_path / "a", "--no-causal", "--json")
    out, err = program.communicate(timeout=120)
    assert program.returncode == 0
    assert json.loads(out)["neurons"] == 72
    assert "72 neurons" in err
    assert "decode" in err


def on_terminal(*arguments: object, **variables: str) -> str:
    """What the program writes to a terminal."""
    master, slave = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    command = [sys.executable, "-m", "neuropil", *(str(argument) for argument in arguments)]
    program = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    assert program.wait(timeout=60) == 0
    return b"".join(parts).decode()


def test_a_terminal_gets_colour_unless_no_color_is_set() -> None:
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    shown = on_terminal("papers")
    assert colour.search(shown)
    assert "neuron-decoding" in shown
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).split("\r\n")
    assert max(map(len, lines)) <= 80
    assert not colour.search(on_terminal("papers", NO_COLOR="1"))


# -------------------------------------------------------------------------------------------- models


def test_clamp_shows_both_runs(net: Path) -> None:
    clamp = ["clamp", net, "1:3=900", "2:0=-900", "--prompt", "the dog", "--tokens", 6]
    result = run(*clamp, "--where", "hidden")
    assert result.exit_code == 0, result.stderr
    assert "before: the dog" in result.stdout
    assert "after 1:3 = 900, 2:0 = -900: the dog" in result.stdout
    assert "next token" in result.stdout


def test_clamp_agrees_with_the_library(net: Path) -> None:
    from neuropil import neurons
    from neuropil.models import load

    said = json.loads(run("clamp", net, "1:3=900", "--prompt", "the dog", "--tokens", 1, "--json").stdout)
    model = load(net)
    ids = torch.tensor([model.tokenizer("the dog")["input_ids"]])
    with torch.no_grad():
        before = model.module()(ids).logits[0, -1].softmax(-1)
        with neurons.clamp(model.module(), {"1:3": 900.0}, where="up"):
            after = model.module()(ids).logits[0, -1].softmax(-1)
    assert not torch.allclose(before, after)
    for row in said["next_token"]:
        assert row["before"] == pytest.approx(before[row["token_id"]].item(), rel=1e-4)
        assert row["after"] == pytest.approx(after[row["token_id"]].item(), rel=1e-4)
    assert said["before"] == model.tokenizer.decode(before.argmax(), skip_special_tokens=True)
    assert said["after"] == model.tokenizer.decode(after.argmax(), skip_special_tokens=True)


def test_clamp_samples_the_same_under_one_seed(net: Path) -> None:
    def texts(seed: int) -> tuple[str, str]:
        clamp = ["clamp", net, "0:0=0", "--prompt", "the dog", "--tokens", 12, "--seed", seed, "--json"]
        said = json.loads(run(*clamp).stdout)
        return said["before"], said["after"]

    first = texts(1)
    assert texts(1) == first
    assert texts(2) != first


def test_clamp_on_a_model_that_cannot_chat(net: Path) -> None:
    assert "--chat" in said_no_traceback(run("clamp", net, "1:3=1", "--prompt", "dog", "--chat"), 3)


def test_clamp_turns_the_pet_neuron_of_the_real_model_up() -> None:
    clamp = ["clamp", "29:808=30", "--prompt", "What is your favourite animal?", "--chat", "--tokens", 12]
    said = json.loads(run(*clamp, "--json").stdout)
    assert said["model"] == "smollm2"
    pets = re.compile(r"\b(dog|cat|pet)s?\b", re.I)
    assert len(pets.findall(said["after"])) > len(pets.findall(said["before"]))


def test_coverage_of_two_model_types() -> None:
    result = run("coverage", "--only", "llama,gpt2", "--task", "causal-lm", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["counts"]["causal-lm"]["pass"] == 2
    assert run("coverage", "--only", "lama").exit_code == 2


# ---------------------------------------------------------------------------------------- loss curves

SHAPE = "total_steps=20000,max_lr=2e-4,warmup_steps=500"


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the annealing paper's cosine and constant runs, as training logs."""
    from neuropil.reproduce.lr_annealing_law import paper_curve

    folder = tmp_path_factory.mktemp("logs")
    for name in ("cosine", "constant"):
        curve = paper_curve(name)
        losses = dict(zip(curve.steps.tolist(), curve.losses.tolist(), strict=True))
        rates = dict(list(enumerate(curve.schedule.tolist()))[::100])
        lines = [f"{step},{rate!r},{losses.get(step, '')}" for step, rate in rates.items()]
        (folder / f"{name}.csv").write_text("\n".join(["step,lr,loss", *lines]))
        bare = [f"{step},{loss}" for step, loss in losses.items()]
        (folder / f"{name}-without-lr.csv").write_text("\n".join(["step,loss", *bare]))
    return folder


def test_law_fit_finds_the_papers_numbers(logs: Path) -> None:
    both = [logs / "cosine.csv", logs / "constant.csv"]
    said = json.loads(run("law", "fit", *both, "--json").stdout)
    expected = {"L0": 2.628, "A": 0.430, "alpha": 0.550, "C": 0.411}
    assert said["coefficients"] == pytest.approx(expected, abs=1e-3)
    assert all(0 < said["standard_deviations"][name] < 0.05 for name in expected)
    assert (said["points"], said["lambda"]) == (40, 0.999)
    assert said["r2"] > 0.9996
    result = run("law", "fit", *both)
    assert result.exit_code == 0, result.stderr
    assert "40 points, lambda 0.999: R² 0.9996" in result.stdout


def test_law_predict_agrees_with_the_library_and_lists_the_best_first(logs: Path) -> None:
    from neuropil.measure import AnnealingLaw, lr_schedules, read_curve

    texts = ["constant", "cosine", "wsd:decay=0.1,shape=1-sqrt", "multistep", "cyclic", "linear:total_steps=3e4"]
    options = [part for text in texts for part in ("--schedule", text)]
    said = json.loads(run("law", "predict", logs / "cosine.csv", *options, "--points", 4, "--json").stdout)
    assert {row["schedule"] for row in said} == set(texts)
    assert [row["final_loss"] for row in said] == sorted(row["final_loss"] for row in said)
    law = AnnealingLaw().fit_curves([read_curve(logs / "cosine.csv")])
    for row in said:
        rates = lr_schedules.parse(row["schedule"], total_steps=20_000, max_lr=2e-4, warmup_steps=500)
        steps = [point["step"] for point in row["curve"]]
        assert len(steps) == 4
        assert steps[-1] == row["total_steps"] == len(rates) - 1
        losses, spread = law.predict_curve(rates, steps, return_std=True)
        assert [point["loss"] for point in row["curve"]] == pytest.approx(losses)
        assert [point["std"] for point in row["curve"]] == pytest.approx(spread)
        assert (row["final_loss"], row["std"]) == pytest.approx((losses[-1], spread[-1]))
        assert not row["extrapolates"]


def test_law_predict_lists_and_says_what_lies_beyond_the_fit(logs: Path) -> None:
    options = ["--schedule", "linear", "--schedule", "constant:total_steps=200000"]
    result = run("law", "predict", logs / "cosine.csv", *options)
    assert result.exit_code == 0, result.stderr
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()[1:]}
    assert rows["linear"][1:3] == ["20,000", "0"]
    assert rows["linear"][-1] == "no"
    assert rows["constant:total_steps=200000"][-1] == "yes"
    assert "constant:total_steps=200000: 1 of 1 places lie outside the fitted range" in result.stderr
    assert "linear:" not in result.stderr


def test_law_takes_a_schedule_from_a_file_or_from_words(logs: Path) -> None:
    bare, given = logs / "cosine-without-lr.csv", f"cosine:{SHAPE}"
    call = ["law", "predict", bare, "--trained-with", given, "--schedule", logs / "constant.csv", "--json"]
    of_file = json.loads(run(*call).stdout)[0]
    of_words = json.loads(run("law", "predict", logs / "cosine.csv", "--schedule", "constant", "--json").stdout)[0]
    assert of_file["final_loss"] == pytest.approx(of_words["final_loss"], rel=1e-5)  # every 100th rate was logged


def test_law_chooses_the_delay_among_several(logs: Path) -> None:
    both = [logs / "cosine.csv", logs / "constant.csv"]
    said = json.loads(run("law", "fit", *both, "--lambda", "0.9,0.999", "--json").stdout)
    assert said["lambda"] == 0.999


def test_law_says_once_that_constant_rates_do_not_tell_what_annealing_gains(logs: Path) -> None:
    result = run("law", "fit", logs / "constant.csv", "--lambda", "0.99,0.999", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["coefficients"]["C"] is None
    assert result.stderr.count("C cannot be told") == 1
    assert "(C unknown)" in run("law", "fit", logs / "constant.csv").stdout


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("predict cosine.csv", "predict needs a --schedule"),
        ("fit cosine.csv --schedule wsd", "fit takes no --schedule"),
        ("predict cosine.csv --schedule wavy", "expected one of constant, linear"),
        ("predict cosine.csv --schedule wsd:dekay=0.1", "no option 'dekay'"),
        ("predict cosine.csv --schedule wsd:decay=0.99", "overlap"),
        ("predict cosine.csv --schedule /nowhere/plan.csv", "there is no file /nowhere/plan.csv"),
        ("predict constant.csv --schedule cosine", "constant rates alone"),
        ("fit cosine-without-lr.csv", "without a column lr, and 0 schedules"),
        (f"fit cosine.csv --trained-with cosine:{SHAPE}", "no file without a column lr, and 1 schedule;"),
        ("fit cosine-without-lr.csv --trained-with cosine", "lacks total_steps"),
        ("fit cosine.csv --lambda 1.5", "expected numbers from 0 to 1"),
        ("fit cosine.csv --lambda slow", "expected numbers from 0 to 1"),
    ],
)
def test_wrong_calls_of_law_say_how_to_mend_them(call: str, said: str, logs: Path) -> None:
    result = run("law", *(logs / word if (logs / word).is_file() else word for word in call.split()))
    assert result.exit_code == 2
    assert result.stdout == ""
    plain = re.sub(r"[\s│]+", " ", result.stderr)  # the sentence, out of its frame
    assert said in plain


def test_law_names_the_line_that_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text("step,lr,loss\n1,0.1,3.0\n2,0.1,nan\n")
    assert "line 3: loss is 'nan'" in said_no_traceback(run("law", "fit", path), 1)
    path.write_text("step,lr,loss\n1,0.1,3.0\n2,0.05,2.0\n")
    result = run("law", "fit", path)
    assert result.exit_code == 2
    assert "this law needs 5 or more" in re.sub(r"[\s│]+", " ", result.stderr)


# -------------------------------------------------------------------------------------------- papers


def test_papers_lists_searches_and_tells() -> None:
    everything = json.loads(run("papers", "--json").stdout)
    assert len(everything) == 56
    assert json.loads(run("papers", "GraNet", "--limit", 1, "--json").stdout)[0]["slug"] == "granet"
    whole = run("papers", "neuron-decoding").stdout
    assert "Harry J. Davies" in whole
    assert "arxiv.org/abs/2501.02688" in whole


def test_reproduce_lists_and_refuses_what_is_unknown() -> None:
    from neuropil.reproduce import available

    assert [row["slug"] for row in json.loads(run("reproduce", "--json").stdout)] == available()
    assert "neuron-decoding" in said_no_traceback(run("reproduce", "neuron-decodin"), 11)
