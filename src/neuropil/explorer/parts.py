"""Routes to what belongs to an atlas besides its table: images, bricks, the circuit diagram."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from markupsafe import Markup
from starlette.exceptions import HTTPException

from neuropil.errors import NeuropilError
from neuropil.explorer import pictures
from neuropil.explorer.drawing import DEPTHS, Drawings
from neuropil.explorer.facts import Facts
from neuropil.explorer.live import Live

OFTEN = {"Cache-Control": "private, max-age=60"}  # pictures: a page shows many, and an atlas may be made anew


def pictures_of(app: FastAPI, facts: Facts) -> None:
    @app.get("/image/{number}.png")
    def image(number: int) -> Response:
        """One of the images that the model was shown."""
        if number not in facts.images:
            raise HTTPException(404, f"this atlas holds no image {number}")
        return Response(facts.images[number]["png"], media_type="image/png", headers=OFTEN)

    @app.get("/neuron/{address}/exemplar/{place}.png")
    def exemplar(address: str, place: int) -> Response:
        """An image that drives a neuron, dimmed outside the region that does."""
        drivers = facts.drivers(address)
        if not 0 <= place < len(drivers):
            raise HTTPException(404, f"neuron {address} has no exemplar {place} whose image is in this atlas")
        return Response(pictures.lit(*drivers[place]), media_type="image/png", headers=OFTEN)

    @app.get("/neuron/{address}/exemplars.png")
    def first(address: str) -> Response:
        """The first few, small and side by side."""
        if not (drivers := facts.drivers(address)):
            raise HTTPException(404, f"neuron {address} has no exemplars whose images are in this atlas")
        return Response(pictures.strip(drivers[:4]), media_type="image/png", headers=OFTEN)


def parts_of(app: FastAPI, facts: Facts, live: Live, page: Any) -> None:
    @app.get("/bricks")
    def bricks(request: Request, site: str = "", function: str = "") -> Response:
        made = facts.bricks
        telling = [number for number, each in made.items() if any(brick.function for brick in each)]
        chosen = int(site) if site.isdecimal() and int(site) in made else next(iter([*telling, *made]), 0)
        shown = [b for b in made.get(chosen, []) if not function or b.function == function]
        return page(
            request,
            "bricks.html",
            made=made,
            chosen=chosen,
            shown=shown,
            function=function[:200],
            functions=facts.values("brick_function"),
        )

    drawings = Drawings(facts.path, live)

    def drawn(depth: int, fold: bool) -> Any:
        fingerprint = facts.told("fingerprint")
        return drawings.drawn(facts.sites, fingerprint, min(max(depth, 0), DEPTHS), fold)

    @app.get("/diagram")
    def diagram(request: Request, depth: int = 1, fold: bool = True) -> Response:
        depth = min(max(depth, 0), DEPTHS)
        return page(request, "diagram.html", depth=depth, fold=fold, depths=DEPTHS)

    @app.get("/diagram/drawing")
    def drawing(request: Request, depth: int = 1, fold: bool = True) -> Response:
        """The drawing alone: tracing a model may take a while, and the page does not wait for it."""
        try:
            svg, problem = Markup(drawn(depth, fold).svg), ""
        except NeuropilError as error:
            svg, problem = Markup(""), str(error)
        return page(request, "_drawing.html", svg=svg, problem=problem, depth=depth, fold=fold, status=live.status)

    @app.get("/diagram/style.css")
    def style(depth: int = 1, fold: bool = True) -> Response:
        return Response(drawn(depth, fold).css, media_type="text/css", headers=OFTEN)
