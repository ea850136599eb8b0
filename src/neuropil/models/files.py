"""`FILE.py:NAME`: a model of one's own, where a command or `load` takes the name of a model.

```python
# nets.py
import torch
from neuropil.models import ImageInput, load

class Net(torch.nn.Module): ...

def trained():
    net = Net()
    net.load_state_dict(torch.load("net.pt"))       # from where the command is given
    model = load(net)                               # the module itself may be given as well
    model.image_input = ImageInput(3, (32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    return model
```

`neuropil atlas nets.py:trained` maps it, `neuropil diagram nets.py:Net` draws the class with its first weights.

The file is run, as `python nets.py` would (but not as `__main__`): name no file that you would not run. What is beside
it can be imported while it runs. torch's random numbers start from 0, so that first weights are the same each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from neuropil.errors import ModelError
from neuropil.models import assets
from neuropil.models.model import Model
from neuropil.models.stores import InMemory

_NAMED = re.compile(r"(.+\.py):([^\W\d]\w*)", re.DOTALL)
_MENDED = "write a function without arguments that gives it, and name that"
_helpers: set[str] = set()  # modules that were found beside a file


def split(source: str) -> tuple[Path, str] | None:
    r"""The file and the name in it; None for a source of another kind.

    >>> [split(source) is None for source in ("nets.py:Net", r"C:\nets.py:Net", "nets.py", "nets.py:3", "smollm2")]
    [False, False, True, True, True]
    """
    found = _NAMED.fullmatch(source)
    return None if found is None else (Path(found[1]).expanduser(), found[2])


def made(path: Path, name: str) -> nn.Module | Model:
    """What the file calls `name`, or what that makes when called; in evaluation mode.

    Raises ModelError where there is no such file or name, the file or the call fails, or it gives something else.
    """
    if not path.is_file():
        raise ModelError(f"{path}:{name}: there is no file {path}; expected FILE.py:NAME, its path from {Path.cwd()}")
    with torch.random.fork_rng(devices=[]), _beside(path):
        torch.manual_seed(0)
        module = _run(path)
        found = _called(_found(module, path, name), path, name)
    inner = found.store.module if isinstance(found, Model) and isinstance(found.store, InMemory) else found
    if isinstance(inner, nn.Module):
        inner.eval()
    return found


def _run(path: Path) -> ModuleType:
    whole = path.resolve()
    module = ModuleType(f"neuropil_file_{hashlib.sha256(str(whole).encode()).hexdigest()[:12]}")
    module.__file__ = str(whole)
    sys.modules[module.__name__] = module  # dataclasses, inspect and torch.export look a class's module up there
    try:
        # Compiled here and not imported: nothing is written beside the file, and no stale bytecode is read.
        exec(compile(path.read_bytes(), str(whole), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise ModelError(f"{path} was run, and raised {_told(error, whole)}; mend the file") from error
    return module


def _found(module: ModuleType, path: Path, name: str) -> Any:
    if name not in vars(module):
        made = [key for key, value in vars(module).items() if key[0] != "_" and _makes(value, module.__name__)]
        raise ModelError(f"{path} has no {name}; of what could be a model, it has {', '.join(made) or 'nothing'}")
    return vars(module)[name]


def _makes(value: Any, where: str) -> bool:
    """Whether it is a model, or a class of modules or a function of the file itself."""
    if isinstance(value, nn.Module | Model):
        return True
    if getattr(value, "__module__", None) != where:
        return False
    return issubclass(value, nn.Module) if isinstance(value, type) else inspect.isfunction(value)


def _called(found: Any, path: Path, name: str) -> nn.Module | Model:
    made, verb = found, "is"
    if callable(found) and not isinstance(found, nn.Module | Model):
        if needed := _needed(found):
            raise ModelError(f"{path}:{name} needs arguments ({', '.join(needed)}); {_MENDED}")
        try:
            made, verb = found(), "gives"
        except (Exception, SystemExit) as error:
            raise ModelError(f"{path}:{name} was called, and raised {_told(error, path.resolve())}") from error
    if not isinstance(made, nn.Module | Model):
        raise ModelError(
            f"{path}:{name} {verb} {type(made).__name__}; expected a torch.nn.Module, or what neuropil.models.load "
            f"gives: {_MENDED}"
        )
    return made


def _needed(function: Any) -> list[str]:
    """Names of the arguments that must be given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of something that is built in
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in optional]


def _told(error: BaseException, path: Path) -> str:
    """The error, and the innermost line of the file or of one beside it that led to it."""
    said = f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}".rstrip(": ")
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{said} ({error.filename}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == path.parent]
    return f"{said} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else said


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[None]:
    """What lies beside the file can be imported; another file's helpers of the same name are not taken for its own."""
    for name in _helpers:
        sys.modules.pop(name, None)
    _helpers.clear()
    folder, kept, before = path.resolve().parent, list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = kept
        if str(folder) not in kept:  # else they are modules as any other
            _helpers.update(name for name in set(sys.modules) - before if _lies(name, folder))


def _lies(name: str, folder: Path) -> bool:
    top = name.partition(".")[0]
    return top != "neuropil" and ((folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file())


# An atlas remembers such a source, and whoever opens the atlas of another must not run a file that it names: only files
# of which an atlas was made here are run for it.


def trust(source: str) -> None:
    """Remembers that the file was run here by its user's wish."""
    if (mark := _mark(source)) is not None:
        with contextlib.suppress(OSError):  # then `--model` must be given again
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()


def trusted(source: str) -> bool:
    mark = _mark(source)
    return mark is not None and mark.exists()


def _mark(source: str) -> Path | None:
    parts = split(source)
    if parts is None:
        return None
    return assets.cache_dir() / "files" / hashlib.sha256(str(parts[0].resolve()).encode()).hexdigest()
