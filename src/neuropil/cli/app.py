"""The Typer application: how a command is run, and how it ends.

Errors that a user can mend end a command with a sentence and the exit code of their class
(`neuropil.errors`); a traceback is shown only with `--debug` or `NEUROPIL_DEBUG=1`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypeVar

import typer
import typer.core
from rich.text import Text

from neuropil import __version__, errors
from neuropil.cli import output

USAGE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141

# As help lists them.
ORDER = [
    "atlas",
    "explore",
    "find",
    "show",
    "query",
    "diff",
    "clamp",
    "describe",
    "compare",
    "compress",
    "bricks",
    "coverage",
    "diagram",
    "geometry",
    "law",
    "shapley",
    "papers",
    "reproduce",
]

EXIT_CODES = {
    0: "success",
    1: "Any other error: a full disk, a file that may not be read, a fault in neuropil.",
    USAGE: "A command that was called wrongly: an unknown option, a missing or malformed argument.",
    **{
        kind.exit_code: (kind.__doc__ or "").strip()
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.NeuropilError) and kind.exit_code > 1
    },
    INTERRUPTED: "Ctrl-C. The message says what was kept and how to go on.",
    CLOSED_PIPE: "The reader of the output closed the pipe (as `| head` does).",
}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the midst of work; the message says what was kept."""


@contextlib.contextmanager
def interruptible(message: Callable[[], str]) -> Iterator[None]:
    """Gives a Ctrl-C inside the block its sentence: what was kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(message()) from stop


def told(error: Exception) -> Exception:
    """What a method refuses, as an error that ends a command with its sentence."""
    return error if isinstance(error, errors.NeuropilError) else errors.NeuropilError(str(error))


def _fail(message: str, code: int, error: BaseException | None = None) -> typer.Exit:
    console = output.errors()
    wide = not console.is_terminal  # in a pipe or a log, one line stays one line
    if error is not None and output.debugging():
        console.print(Text("".join(traceback.format_exception(error))), soft_wrap=True)
    first, _, rest = message.partition("\n")
    console.print(Text.assemble(("error: ", "bold red"), output.clean(first)), soft_wrap=wide)
    if rest:
        console.print(Text(output.clean(rest, newlines=True)), soft_wrap=wide)
    return typer.Exit(code)


def _silence_stdout() -> None:
    """After a closed pipe: what is still buffered goes nowhere, instead of into a second error."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full. What was already written is kept; make room and run the same command again."
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


@contextlib.contextmanager
def _ended_well() -> Iterator[None]:
    """Turns what a command raises into a sentence on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        raise typer.Exit(CLOSED_PIPE) from None
    except KeyboardInterrupt as stop:
        said = str(stop) if isinstance(stop, Interrupted) else "Stopped; nothing was changed."
        output.errors().print(Text(said), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except errors.NeuropilError as error:
        raise _fail(str(error), error.exit_code, error) from None
    except OSError as error:
        raise _fail(_os_error(error), 1, error) from None
    except MemoryError as error:
        raise _fail("there is not enough memory for this.", 1, error) from None
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] == "typer":  # a usage error: Typer shows it itself
            raise
        message = f"{type(error).__name__}: {error}\nThis is a fault in neuropil; --debug shows where."
        raise _fail(message, 1, error) from None


class Command(typer.core.TyperCommand):
    """A command whose stdout carries its answer alone, and whose errors are sentences."""

    def invoke(self, ctx: Any) -> Any:
        _quiet_libraries()
        with _ended_well(), output.answers_only():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _without_epilog(self):
            super().format_help(ctx, formatter)
        _print_examples(self.epilog)


class Commands(typer.core.TyperGroup):
    """The group of commands; `--debug` may stand anywhere before `--`."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _without_epilog(self):
            super().format_help(ctx, formatter)
        _print_examples(self.epilog)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        output.debug("--debug" in args[:end])
        kept = [argument for argument in args[:end] if argument != "--debug"]
        return super().parse_args(ctx, kept + args[end:])


def _quiet_libraries() -> None:
    """Their warnings are about themselves; with --debug they are shown."""
    if not output.debugging():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.simplefilter("ignore")
        for name in ("torchao", "torch.utils._pytree"):  # of kernels for other machines, when transformers imports it
            logging.getLogger(name).setLevel(logging.ERROR)


def examples(*lines: str) -> str:
    """The epilog of a command: a line for each example, what it does after three spaces or more."""
    return "\n".join(lines)


def split_example(line: str) -> tuple[str, str]:
    """
    >>> split_example("neuropil papers    all of them")
    ('neuropil papers', 'all of them')
    """
    call, _, remark = line.partition("   ")
    return call, remark.strip()


@contextlib.contextmanager
def _without_epilog(shown: typer.core.TyperCommand | typer.core.TyperGroup) -> Iterator[None]:
    kept, shown.epilog = shown.epilog, None
    try:
        yield
    finally:
        shown.epilog = kept


def _print_examples(epilog: str | None) -> None:
    """One line an example where the terminal is wide enough, else the remark on a line of its own."""
    pairs = [split_example(line) for line in (epilog or "").splitlines()]
    if not pairs:
        return
    console = output.console()
    width = max(len(call) for call, _ in pairs)
    fits = width + max(len(remark) for _, remark in pairs) + 6 <= console.width
    console.print(Text(" Examples", style="bold"))
    for call, remark in pairs:
        shown = Text(f"   {call:<{width}}" if fits and remark else f"   {call}")
        if remark:
            shown.append(f"   {remark}" if fits else f"\n       {remark}", style="dim")
        console.print(shown, soft_wrap=True)
    console.print()


app = typer.Typer(
    name="neuropil",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "neuropil atlas                                   map every neuron of SmolLM2-135M",
        'neuropil find atlases/smollm2 "dog"              which neurons stand for dogs?',
        "neuropil show atlases/smollm2 29:808             all that is known of one neuron",
        'neuropil clamp 29:808=30 --prompt "My pet is"    turn it up, and read on',
        "neuropil explore atlases/smollm2                 the atlas as a page in the browser",
    ),
)


def _version(value: bool) -> bool:
    if value:
        typer.echo(f"neuropil {__version__}")
        raise typer.Exit()
    return value


@app.callback()
def _neuropil(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and warnings; so does NEUROPIL_DEBUG=1."),
    ] = False,
) -> None:
    """See, shrink, grow, build, train and measure neural networks one neuron at a time."""


Function = TypeVar("Function", bound=Callable[..., Any])


def command(name: str, panel: str, *lines: str) -> Callable[[Function], Function]:
    """Registers a command with its examples."""
    return app.command(name, cls=Command, rich_help_panel=panel, epilog=examples(*lines))


MODEL = "MODEL"
ANY_MODEL = (
    "smollm2, efficientnet-lite0, a Hugging Face folder or name, a GGUF file, or FILE.py:NAME (the file is run; NAME "
    "is a module in it, or a class or function that makes one)."
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
