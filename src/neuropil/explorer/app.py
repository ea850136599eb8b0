"""The routes of the explorer. Each asks `Facts` or `Live` and hands the answer to a template."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Form, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from markupsafe import Markup
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

import neuropil
from neuropil.errors import NeuropilError, QueryError, UnknownNeuron
from neuropil.explorer import pictures, words
from neuropil.explorer.cells import ADDRESS, cells, heads
from neuropil.explorer.drawing import DEPTHS, Drawings
from neuropil.explorer.facts import Facts
from neuropil.explorer.guard import Guard
from neuropil.explorer.live import Live, NotReady, Run
from neuropil.explorer.view import FLAGS, MOST_ROWS, PAGE, View

HERE = Path(__file__).parent
EXAMPLES = (
    (
        "Strongest suppressors",
        "SELECT neuron, label, effect, effect_se, cos_up, cos_down\nFROM neurons\n"
        "WHERE verdict = 'suppresses' AND NOT hub\nORDER BY effect\nLIMIT 50",
    ),
    (
        "Confirmed, by layer",
        "SELECT layer, count(*) AS neurons, avg(specialised::INT) AS specialised,\n"
        "       avg(confirmed::INT) AS confirmed\nFROM neurons\nGROUP BY layer\nORDER BY layer",
    ),
    (
        "Words with most neurons",
        "SELECT label, count(*) AS neurons, max(specialisation) AS best\n"
        "FROM neurons\n"
        "WHERE specialised AND NOT hub AND label <> ''\nGROUP BY label\nORDER BY neurons DESC\nLIMIT 50",
    ),
    ("What can be asked", "DESCRIBE neurons"),
)
EXAMPLES_SEEN = (
    (
        "Most selective",
        "SELECT neuron, preferred_class, selectivity, activation_max\nFROM neurons\nWHERE NOT dead\n"
        "ORDER BY selectivity DESC NULLS LAST\nLIMIT 50",
    ),
    (
        "Missed most",
        "SELECT neuron, ablation, ablation_se, ablation_estimate\nFROM neurons\nWHERE ablation > 2 * ablation_se\n"
        "ORDER BY ablation DESC\nLIMIT 50",
    ),
    (
        "By layer",
        "SELECT site, module, count(*) AS neurons, sum(dead::INT) AS dead, avg(sparsity) AS sparsity\n"
        "FROM neurons\nGROUP BY ALL\nORDER BY site",
    ),
    ("What can be asked", "DESCRIBE neurons"),
)
OFTEN = {"Cache-Control": "private, max-age=60"}  # pictures: a page shows many, and an atlas may be made anew


class RunRequest(BaseModel):
    """What the playground sends."""

    prompt: str = Field(max_length=8000)
    clamps: dict[str, Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]] = Field(max_length=64)
    where: Literal["hidden", "up"] = "hidden"
    chat: bool = False
    tokens: int = Field(default=60, ge=1, le=400)
    temperature: float = Field(default=0.0, ge=0, le=3, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**31)


def build(path: Path, model: Any, hosts: list[str] | None) -> FastAPI:
    """Put the application together; see `neuropil.explorer.create_app`."""
    facts = Facts(path)
    source, why = (model, "") if model is not None else _source(facts)
    live = Live(source, _field(facts.atlas.manifest, "fingerprint"), why)
    templates = Jinja2Templates(HERE / "templates")  # autoescape is on for .html
    templates.env.filters.update(number=words.number, shown=words.shown)
    templates.env.globals.update(
        atlas=path.resolve().name,
        facts=facts,
        live=live,
        version=neuropil.__version__,
        model_name=_field(facts.atlas.manifest, "name", "model") or "unknown model",
    )
    app = FastAPI(
        title="neuropil",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(facts.refresh)],
    )
    app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=4)
    app.add_middleware(Guard, hosts=hosts)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    def page(request: Request, template: str, code: int = 200, **context: Any) -> HTMLResponse:
        return templates.TemplateResponse(request, template, context, status_code=code)

    _errors(app, page)
    _table(app, facts, page)
    _map(app, facts, page)
    _neuron(app, facts, live, page)
    _playground(app, facts, live, page)
    _pictures(app, facts)
    _parts(app, facts, live, page)
    app.state.live, app.state.facts = live, facts
    return app


def _field(manifest: Any, *names: str) -> str:
    """A text of the manifest, which keeps the facts of the model under "model"."""
    model = manifest.get("model") if isinstance(manifest.get("model"), dict) else {}
    for name in names:
        value = model.get(name) or manifest.get(name)
        if isinstance(value, str) and value:
            return value
    return ""


def _source(facts: Facts) -> tuple[str | None, str]:
    """The model the atlas was made of, and why there is none: its folder if that is still there, else its name."""
    from neuropil.models import files

    source, path = (_field(facts.atlas.manifest, name) for name in ("source", "path"))
    if files.split(source) is not None:
        # Whoever opens an atlas that comes from elsewhere does not run a file that is named in it.
        why = f"the atlas is of {source}, and no atlas was made of such a file here; to run it, give --model {source}"
        return (source, "") if files.trusted(source) else (None, why)
    if path and Path(path).exists():
        return path, ""
    return _field(facts.atlas.manifest, "name", "model") or None, "this atlas does not say which model it was made of"


def _errors(app: FastAPI, page: Any) -> None:
    def show(request: Request, status: int, head: str, message: str) -> Response:
        name = "_error.html" if request.headers.get("hx-request") else "error.html"
        return page(request, name, status, head=head, message=message)

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return show(
            request,
            error.status_code,
            "No such page" if error.status_code == 404 else "Not possible",
            str(error.detail),
        )

    @app.exception_handler(UnknownNeuron)
    def unknown(request: Request, error: UnknownNeuron) -> Response:
        return show(request, 404, "No such neuron", str(error))

    @app.exception_handler(NeuropilError)
    def told(request: Request, error: NeuropilError) -> Response:
        return show(request, 400, "That did not work", str(error))


def _table(app: FastAPI, facts: Facts, page: Any) -> None:
    def read(request: Request) -> View:
        query = dict(request.query_params)
        if boxes := request.query_params.getlist("col"):  # the column chooser's boxes
            query["cols"] = View.boxes(boxes, facts.columns)
        return View.read(query, facts.columns)

    def answer(request: Request, view: View, path: str) -> Response:
        part, error, result = bool(request.headers.get("hx-request")), "", None
        context: dict[str, Any] = {}
        try:
            if path == "/" or view.sql:
                result = facts.page(view)
                context = {"heads": heads(result.table, view), "rows": cells(result.table, facts)}
        except QueryError as problem:
            error = str(problem)
        response = page(
            request,
            "_results.html" if part else "table.html",
            400 if error and not part else 200,
            view=view,
            path=path,
            result=result,
            error=error,
            examples=examples(facts),
            flags=FLAGS,
            count=facts.count(view) if result else None,
            chosen=view.chosen(facts.columns),
            most=MOST_ROWS,
            step=PAGE,
            **context,
        )
        if part:
            response.headers["HX-Push-Url"] = view.url(path)
        response.headers["Vary"] = "HX-Request"
        return response

    @app.get("/")
    def table(request: Request) -> Response:
        view = read(request)
        return answer(request, View(**{**vars(view), "sql": ""}), "/")

    @app.get("/sql")
    def sql(request: Request) -> Response:
        view = read(request)
        return answer(request, View(sql=view.sql, sort=view.sort, start=view.start, rows=view.rows), "/sql")

    @app.get("/more")
    def more(request: Request) -> Response:
        """The next rows of a table, for scrolling on; the address then says how many are shown."""
        view = read(request)
        path = "/sql" if view.sql else "/"
        shown = View(**{**vars(view), "start": view.start + view.rows, "rows": PAGE})
        result = facts.page(shown)
        grown = View(**{**vars(view), "rows": view.rows + PAGE})
        response = page(
            request,
            "_rows.html",
            view=grown,
            path=path,
            result=result,
            most=MOST_ROWS,
            step=PAGE,
            heads=heads(result.table, view),
            rows=cells(result.table, facts),
        )
        response.headers["HX-Replace-Url"] = grown.url(path)
        return response

    @app.get("/download/{kind}")
    def download(request: Request, kind: Literal["csv", "parquet"]) -> Response:
        data, media = facts.download(read(request), kind)
        disposition = f'attachment; filename="neurons.{kind}"'
        return Response(data, media_type=media, headers={"Content-Disposition": disposition})

    @app.get("/go")
    def go(to: str = "") -> Response:
        """Where the box in the head leads: to a neuron by its address, else to a search."""
        to = to.strip()
        if ADDRESS.fullmatch(to):
            return RedirectResponse(f"/neuron/{to}", 303)
        return RedirectResponse(View(q=to).url("/"), 303)


def examples(facts: Facts) -> list[tuple[str, str]]:
    """The example questions that this atlas can answer."""
    if not facts.sees:
        return list(EXAMPLES)
    needs = {"Most selective": "selectivity", "Missed most": "ablation", "By layer": "sparsity"}
    return [(name, sql) for name, sql in EXAMPLES_SEEN if needs.get(name, "neuron") in facts.columns]


def _map(app: FastAPI, facts: Facts, page: Any) -> None:
    @app.get("/map")
    def show(request: Request, column: str = "", order: str = "", q: str = "") -> Response:
        offered = facts.colourable
        usual = ("verdict", "specialisation", "specialised", "preferred_class", "selectivity", "sparsity")
        first = next((c for c in usual if c in offered), "")
        column = column if column in offered else first or next(iter(offered), "")
        return page(request, "map.html", column=column, order="value" if order == "value" else "", q=q[:400])

    @app.get("/map/values")
    def values(column: str) -> Response:
        return Response(facts.map(column), media_type="application/octet-stream")

    @app.get("/map/labels")
    def labels() -> Response:
        return Response(json.dumps(facts.labels(), ensure_ascii=False), media_type="application/json")

    @app.get("/map/found")
    def found(q: str = "") -> JSONResponse:
        return JSONResponse(facts.found(q[:400]) if q.strip() else [])


def _neuron(app: FastAPI, facts: Facts, live: Live, page: Any) -> None:
    @app.get("/neuron/{address}")
    def show(request: Request, address: str) -> Response:
        row = facts.neuron(address)
        address = str(row["neuron"])
        number, index = (int(x) for x in address.split(":"))
        site = next(s for s in facts.sites if s.number == number)
        scale = words.null99(row)
        lost = words.axis([("ablation", row.get("ablation"), row.get("ablation_se"), "effect")])
        effect = words.axis(
            [
                ("effect", row.get("effect"), row.get("effect_se"), "effect"),
                ("control", row.get("control"), row.get("control_se"), "control"),
            ]
        )
        return page(
            request,
            "neuron.html",
            row=row,
            address=address,
            site=site,
            index=index,
            null99=scale,
            name=words.named(row),
            verdict=words.verdict(row),
            signs=words.signs(row),
            panels=words.panels(row, scale),
            axis=effect,
            lost=lost,
            exemplars=pictures.exemplars(row, facts.images),
            does=words.silenced(row),
            roles=[r for r in words.ROLES if row.get(f"cos_{r}") is not None],
            role_names=words.ROLES,
            before=f"{number}:{index - 1}" if index else None,
            after=f"{number}:{index + 1}" if index + 1 < site.width else None,
        )

    @app.get("/neuron/{address}/alike")
    def alike(request: Request, address: str, by: str = "tokens", wide: bool = False) -> Response:
        row = facts.neuron(address)
        address = str(row["neuron"])
        model = live.light() if by in words.ROLES else None
        note = ""
        by = "images" if facts.sees and by == "tokens" else by
        if model is not None:
            pairs = facts.alike_by_rows(address, by, model, wide)
        else:
            if by in words.ROLES:
                by = "images" if facts.sees else "tokens"
                note = f"The weights are not to be had ({live.status.message}), so this is by shared {by}."
            pairs = facts.alike_by_images(address) if facts.sees else facts.alike_by_tokens(address)
        known = facts.brief([a for a, _ in pairs])
        return page(
            request,
            "_alike.html",
            pairs=pairs,
            known=known,
            role=row.get("label_from") or "up",
            by=by,
            wide=wide,
            note=note,
            address=address,
        )

    @app.post("/neuron/{address}/fires")
    def fires(request: Request, address: str, text: Annotated[str, Form()] = "") -> Response:
        address = str(facts.neuron(address)["neuron"])
        firing, problem = None, ""
        status = live.start()
        if status.state == "ready":
            try:
                firing = live.fires(address, text)
            except NotReady as error:
                problem = str(error)
        response = page(
            request,
            "_fires.html",
            address=address,
            firing=firing,
            status=live.status,
            problem=problem,
            reach=max((abs(v) for v in firing.values), default=0.0) if firing else 0.0,
        )
        response.headers["HX-Trigger"] = "model"  # the head's note of the model looks again
        return response

    @app.get("/model")
    def model(request: Request) -> Response:
        return page(request, "_model.html")

    @app.post("/model")
    def load(request: Request) -> Response:
        live.start()
        return page(request, "_model.html")


def _playground(app: FastAPI, facts: Facts, live: Live, page: Any) -> None:
    @app.get("/playground")
    def show(request: Request, prompt: str = "", clamp: str = "", where: str = "hidden") -> Response:
        """`clamp` is `29:808=30,29:500=-10`."""
        pairs = re.findall(r"(\d+:\d+)=(-?\d+(?:\.\d+)?)", clamp)[:64]
        known = facts.brief([a for a, _ in pairs])
        clamps = [(a, float(v), known[a]) for a, v in pairs if a in known]
        return page(
            request,
            "playground.html",
            prompt=prompt[:8000],
            clamps=clamps,
            offered=facts.offered(""),
            where="up" if where == "up" else "hidden",
        )

    @app.get("/playground/offer")
    def offer(request: Request, q: str = "") -> Response:
        q = q.strip()[:400]
        offered = list(facts.brief([q]).values()) if ADDRESS.fullmatch(q) else facts.offered(q)
        return page(request, "_offer.html", offered=offered, q=q)

    @app.post("/playground/run")
    async def run(request: Request, wanted: RunRequest) -> StreamingResponse:
        job = Run(**wanted.model_dump())
        return StreamingResponse(
            _events(request, live, job), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )


def _pictures(app: FastAPI, facts: Facts) -> None:
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


def _parts(app: FastAPI, facts: Facts, live: Live, page: Any) -> None:
    @app.get("/bricks")
    def bricks(request: Request, site: str = "", function: str = "") -> Response:
        made = facts.bricks
        numbers = list(made)
        chosen = int(site) if site.isdecimal() and int(site) in made else (numbers[0] if numbers else 0)
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
        fingerprint = _field(facts.atlas.manifest, "fingerprint")
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


async def _events(request: Request, live: Live, job: Run) -> AsyncIterator[str]:
    """A run as server-sent events; it ends when the visitor stops it or goes away."""
    steps = live.generate(job)
    try:
        async for event in iterate_in_threadpool(steps):
            yield f"data: {json.dumps(event)}\n\n"
            if await request.is_disconnected():
                break
    finally:
        job.stop.set()
        steps.close()
