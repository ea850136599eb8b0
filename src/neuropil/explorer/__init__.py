"""The atlas in a browser: a table, a map, a page a neuron, and a playground that clamps.

    neuropil explore ATLAS

serves it on this machine alone. Nothing on the pages comes from anywhere else, so it works offline.
"""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuropil.errors import MissingExtra

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_app", "serve"]


def create_app(atlas_path: str | Path, model: Any = None, hosts: list[str] | None = None) -> "FastAPI":
    """The explorer of one atlas as an ASGI application.

    Args:
        atlas_path: the atlas's folder.
        model: what the live features (firing, neighbours by weight, playground) run: a name or path for
            `neuropil.models.load`, or a model already loaded. None takes the model the atlas was made
            of. It is loaded when first needed, in the background.
        hosts: names under which the page may be asked for; others are refused (DNS rebinding).

    Raises:
        AtlasError: the folder is no atlas.
        MissingExtra: the `explore` extra is not installed.
    """
    try:
        from neuropil.explorer.app import build
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in {"fastapi", "starlette", "jinja2", "multipart"}:
            raise
        raise MissingExtra(
            f"the explorer needs {error.name}, which is not installed: pip install 'neuropil[explore]'"
        ) from error
    return build(Path(atlas_path), model, hosts)


def serve(
    atlas_path: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: Any = None,
    open_browser: bool = False,
) -> None:
    """Serve the explorer until interrupted. See `create_app` for the arguments.

    Listening anywhere but on this machine's own address lets everyone who can reach it read the atlas
    and use the model: there is no login.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "the explorer needs uvicorn, which is not installed: pip install 'neuropil[explore]'"
        ) from error
    local = host in {"127.0.0.1", "localhost", "::1"}
    app = create_app(atlas_path, model, hosts=None if local else [host] if host != "0.0.0.0" else ["*"])
    # The first search loads the sentence model: begun now, it is done when someone searches.
    threading.Thread(target=app.state.facts.warm, daemon=True, name="neuropil-explorer-warm").start()
    if open_browser:
        import webbrowser

        shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
        threading.Timer(1.0, webbrowser.open, [f"http://{shown}:{port}/"]).start()
    uvicorn.run(app, host=host, port=port, log_level="warning")
