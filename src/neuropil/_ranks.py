"""Who writes: one process at a time, or the ranks of one `torchrun` together."""

from __future__ import annotations

import json
import os
import socket
import sys
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from neuropil import errors
from neuropil.errors import AtlasBusy, AtlasError, NeuropilError

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """The right to write to one folder, held through the operating system, so that it ends with the process.

    Raises AtlasBusy, saying who holds it, where another has it.
    """

    def __init__(self, path: Path) -> None:
        self._handle = -1
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as bad:
            raise AtlasError(f"cannot write to {path.parent}: {bad.strerror}; open it for reading only") from bad
        try:
            _take(handle)
        except OSError as bad:
            os.close(handle)
            raise AtlasBusy(
                f"{path.parent} is being written by {holder(path) or 'another process'}; wait until it ends, "
                "stop it, or choose another folder. Reading is free meanwhile."
            ) from bad
        self._handle = handle
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        try:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(me).encode())
        except OSError:  # a full disk: the lock holds all the same, only its owner's name is lost
            pass
        _held.add(self)

    def release(self) -> None:
        """Let others write."""
        if self._handle >= 0:
            try:
                os.ftruncate(self._handle, 0)
            finally:
                self.drop()

    def drop(self) -> None:
        """Close this process's handle; the lock itself lives on where another process shares the handle."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _take(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the text, which must stay readable
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _forget_in_child() -> None:
    # A forked child shares the handle, and would keep the lock alive after its parent was killed.
    for lock in list(_held):
        lock.drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def busy(path: Path) -> str:
    """Who is writing now, in words; empty if nobody is.

    Read from what the writer wrote of itself: to try the lock would, for that moment, keep a writer out.
    """
    try:
        who = json.loads(path.read_text())
        if who["host"] == socket.gethostname() and not _alive(int(who["pid"])):
            return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return holder(path)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # there, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def holder(path: Path) -> str:
    """Who last took the lock, as it wrote itself down."""
    try:
        who = json.loads(path.read_text())
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def now() -> str:
    """The time, for manifests and locks (never for parts)."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Ranks:
    """The processes that build one atlas together: one, or all ranks of `torch.distributed`.

    Both methods are collective: every rank calls them. An error on one rank is told to all, so that none
    waits for a rank that gave up.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        # A rank may compute for hours before the others hear of it; a peer that dies closes its connection,
        # which gloo notices at once whatever the timeout.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if self.size > 1 else None

    def first(self, work: Callable[[], Any]) -> Any:
        """Rank 0 works; every rank gets the answer (plain JSON values), or the error."""
        return self.all(lambda: work() if self.rank == 0 else None)[0]

    def all(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank works; each gets the answers of all (plain JSON values), or an error if one failed."""
        failure: BaseException | None = None
        message: dict[str, Any] = {}
        try:
            message = {"value": work()}
        except BaseException as bad:
            if self.size == 1 or not isinstance(bad, (Exception, KeyboardInterrupt)):
                raise
            failure, message = bad, {"error": type(bad).__name__, "text": str(bad)}
        answers = self._gather(message)
        if failure is not None:
            raise failure
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise _kind(answer["error"])(f"rank {rank} of {self.size} failed: {answer['text']}")
        return [answer["value"] for answer in answers]

    def _gather(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        if self._group is None:
            return [message]
        # As JSON in byte tensors: torch's own object collectives would unpickle.
        mine = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._group)
        room = int(max(int(size) for size in sizes))
        padded = torch.zeros(room, dtype=torch.uint8)
        padded[: len(mine)] = mine
        texts = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self._group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]


def _kind(name: str) -> type[NeuropilError]:
    kind = getattr(errors, name, AtlasError)
    return kind if isinstance(kind, type) and issubclass(kind, NeuropilError) else AtlasError
