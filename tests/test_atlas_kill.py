"""What killed, simultaneous and distributed builds leave behind. Real processes, real signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from atlas_builder import CHAIN, SITES, build, columns

from neuropil.atlas import Atlas
from neuropil.errors import AtlasBusy

BUILDER = str(Path(__file__).with_name("atlas_builder.py"))
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def files(folder: Path) -> dict[str, bytes]:
    """Every finished file of an atlas but the manifest, which has times in it."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("manifest.json", ".lock"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a build that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "atlas"
    assert build(str(folder)) == 2 * SITES
    return files(folder)


def start(*arguments: str, **more: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, BUILDER, *arguments]
    return subprocess.Popen(command, env={**ENV, **more}, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_whole_build_has_every_part_and_nothing_else(whole: dict[str, bytes]) -> None:
    parts = {f"parts/{g}/{n:05d}.parquet" for g in ("first", "second") for n in range(SITES)}
    assert set(whole) == parts | {"vocabulary.parquet"}


def test_builds_killed_anywhere_resume_to_the_same_bytes(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "atlas"
    killer = start("kill", str(folder), "7")
    assert killer.stdin is not None
    assert killer.stdout is not None
    killed, before = 0, 0
    for _ in range(12):
        killer.stdin.write("next\n")
        killer.stdin.flush()
        how, parts = killer.stdout.readline().split()
        killed += how == "killed"
        assert int(parts) >= before, "a finished part was lost"
        before = int(parts)
        if (folder / "manifest.json").exists():
            with Atlas.open(folder) as atlas:  # what a kill leaves can be read, and is whole as far as it goes
                groups = atlas.status()["groups"].values()
                assert sum(group["parts"] for group in groups) == before
    killer.communicate()
    assert killed >= 6
    assert before > 0
    build(str(folder))
    assert files(folder) == whole


def test_a_second_writer_is_refused_and_a_reader_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "atlas"
    holder = start("hold", str(folder))
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        for attempt in (lambda: Atlas.create(folder, CHAIN), lambda: Atlas.open(folder, write=True)):
            with pytest.raises(AtlasBusy, match=rf"process {holder.pid} on .+ since 20"):
                attempt()
        with Atlas.open(folder) as reader:
            assert f"process {holder.pid}" in reader.status()["writing"]
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Atlas.open(folder) as reader:
            assert reader.status()["writing"] is None
        with Atlas.open(folder, write=True) as writer:
            assert writer.add("first", columns, settings={"a": 1}, progress=False) == SITES
    finally:
        holder.kill()
        holder.communicate()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    atlas = Atlas.create(tmp_path / "atlas", CHAIN)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        atlas.close()
        Atlas.open(tmp_path / "atlas", write=True).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_two_ranks_build_the_same_atlas_as_one(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "atlas"
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        BUILDER,
        "build",
        str(folder),
    ]
    done = subprocess.run([sys.executable, *command], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"parts {2 * SITES}") == 2
    assert files(folder) == whole


@pytest.mark.parametrize("how", ["--fail", "--die"])
def test_a_failing_rank_is_told_to_the_others(tmp_path: Path, whole: dict[str, bytes], how: str) -> None:
    # Without torchrun, which would end the other ranks by itself.
    folder = tmp_path / "atlas"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start("build", str(folder), how, "1", RANK=str(rank), **world) for rank in (0, 1)]
    try:
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode != 0 for rank in ranks)
    if how == "--fail":
        assert "rank 1 of 2 failed: this rank fails on purpose" in told[0]
        assert "ValueError: this rank fails on purpose" in told[1]
    assert len(list(folder.glob("parts/first/*.parquet"))) == SITES // 2, "what the other rank made is kept"
    build(str(folder))
    assert files(folder) == whole
