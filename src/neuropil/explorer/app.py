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
from pydantic import BaseModel, Field
from starlette.concurrency import iterate_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

import neuropil
from neuropil.errors import NeuropilError, QueryError, UnknownNeuron
from neuropil.explorer import alike, parts, pictures, words
from neuropil.explorer.cells import ADDRESS, cells, heads
from neuropil.explorer.examples import examples
from neuropil.explorer.facts import Facts
from neuropil.explorer.guard import Guard
from neuropil.explorer.live import Live, NotReady, Run
from neuropil.explorer.view import FLAGS, MOST_ROWS, PAGE, View

HERE = Path(__file__).parent


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
    live = Live(source, facts.told("fingerprint"), why)
    templates = Jinja2Templates(HERE / "templates")  # autoescape is on for .html
    templates.env.filters.update(number=words.number, shown=words.shown)
    templates.env.globals.update(
        atlas=path.resolve().name,
        facts=facts,
        live=live,
        version=neuropil.__version__,
        model_name=facts.told("name", "model") or "unknown model",
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
    parts.pictures_of(app, facts)
    parts.parts_of(app, facts, live, page)
    app.state.live, app.state.facts = live, facts
    return app


def _source(facts: Facts) -> tuple[str | None, str]:
    """The model the atlas was made of, and why there is none: its folder if that is still there, else its name."""
    from neuropil.models import files

    source, path = (facts.told(name) for name in ("source", "path"))
    if files.split(source) is not None:
        # Whoever opens an atlas that comes from elsewhere does not run a file that is named in it.
        why = f"the atlas is of {source}, and no atlas was made of such a file here; to run it, give --model {source}"
        return (source, "") if files.trusted(source) else (None, why)
    if path and Path(path).exists():
        return path, ""
    return facts.told("name", "model") or None, "this atlas does not say which model it was made of"


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
    def neighbours(request: Request, address: str, by: str = "tokens", wide: bool = False) -> Response:
        row = facts.neuron(address)
        address = str(row["neuron"])
        model = live.light() if by in words.ROLES else None
        note = ""
        by = "images" if facts.sees and by == "tokens" else by
        if model is not None:
            pairs = alike.by_rows(address, by, model, wide)
        else:
            if by in words.ROLES:
                by = "images" if facts.sees else "tokens"
                note = f"The weights are not to be had ({live.status.message}), so this is by shared {by}."
            pairs = alike.by_images(facts, address) if facts.sees else alike.by_tokens(facts, address)
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
