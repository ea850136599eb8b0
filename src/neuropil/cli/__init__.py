"""The command line: `neuropil --help`.

Nothing heavy is imported here. Each command imports what it needs when it runs, so that help, completion and
errors in what was typed come at once.
"""

from __future__ import annotations

import os
import sys

from neuropil.cli.app import INTERRUPTED, app

# Importing a module registers its commands.
from neuropil.cli import (  # noqa: F401  isort: skip
    atlas,
    bricks,
    clamp,
    compare,
    compress,
    coverage,
    describe,
    diagram,
    diff,
    geometry,
    law,
    papers,
    reproduce,
    shapley,
    show,
)

__all__ = ["app", "main"]


def main() -> None:
    """Runs the command line and exits with its code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a token the terminal cannot encode must not end a listing
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="neuropil")
    except KeyboardInterrupt:  # before a command began
        os._exit(INTERRUPTED)
