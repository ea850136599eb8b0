"""The pages in a real Chromium: mouse, keyboard and touch, wide and narrow, light and dark."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser
expect.set_options(timeout=30_000)  # a page that is only slow is no failure
Visit = Callable[..., Page]
EVERY_PAGE = ["/", "/sql?sql=DESCRIBE+neurons", "/map", "/neuron/0:1", "/playground?clamp=1:3=20"]


def query(page: Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def addresses(page: Page) -> list[str]:
    return page.locator("#results td a.address").all_inner_texts()


def at_rest(page: Page) -> None:
    page.wait_for_load_state("networkidle")


# ------------------------------------------------------------------------------------------- every page


@pytest.mark.parametrize("path", EVERY_PAGE)
@pytest.mark.parametrize("phone", [False, True])
def test_fits_its_screen_and_runs_no_markup_of_the_atlas(visit: Visit, path: str, phone: bool) -> None:
    page = visit(path, phone=phone, dark=phone)
    at_rest(page)
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1], f"{path} scrolls sideways: {wide}"
    assert page.title() != "owned"
    assert page.locator("main script, main img").count() == 0
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, canvas[tabindex]')].filter(e => !e.labels?.length"
        " && !e.ariaLabel && !e.getAttribute('aria-labelledby')).map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert page.locator("h1").count() == 1
    if phone:
        page.set_viewport_size({"width": 360, "height": 780})
        page.wait_for_timeout(150)  # the map draws itself anew
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("path", ["/", "/neuron/0:0", "/playground"])
def test_text_stands_out_from_its_ground(visit: Visit, path: str, dark: bool) -> None:
    """WCAG AA: 4.5 to 1 for all text on opaque grounds (3 to 1 where it is large)."""
    page = visit(path, dark=dark)
    at_rest(page)
    poor = page.evaluate(
        """() => {
      const rgb = (c) => { const d = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        d.fillStyle = c; d.fillRect(0, 0, 1, 1); return [...d.getImageData(0, 0, 1, 1).data]; };
      const line = (v) => v <= 10 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
      const light = ([r, g, b]) => 0.2126 * line(r) + 0.7152 * line(g) + 0.0722 * line(b);
      const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
        if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
      const poor = [];
      for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
        const s = getComputedStyle(e);
        if (!own || !e.checkVisibility() || e.closest('svg, [disabled], .hidden, .skip') || s.opacity < 1) continue;
        const a = light(rgb(s.color)), b = light(ground(e)), size = parseFloat(s.fontSize);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < (size >= 24 || size >= 18.7 && s.fontWeight >= 600 ? 3 : 4.5))
          poor.push([e.className, e.textContent.trim().slice(0, 20), ratio.toFixed(2)].join(' | '));
      }
      return [...new Set(poor)];
    }"""
    )
    assert poor == []


def test_dark_mode_is_dark(visit: Visit) -> None:
    def ground(page: Page) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(x) for x in re.findall(r"\d+", colour)[:3])

    assert ground(visit("/", dark=True)) < 150 < 600 < ground(visit("/"))


def test_the_skip_link_comes_first_and_skips(visit: Visit) -> None:
    page = visit("/")
    page.keyboard.press("Tab")
    expect(page.locator("a.skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"


# ------------------------------------------------------------------------------------------- table


def test_filters_change_the_rows_and_the_address(visit: Visit) -> None:
    page = visit("/")
    page.select_option("#verdict", "suppresses")
    expect(page.locator("#results [role=status]")).not_to_contain_text("72 neurons")
    page.locator("#layer").fill("1-2")
    page.wait_for_url(re.compile("layer=1-2"))
    at_rest(page)
    assert query(page) == {"verdict": ["suppresses"], "layer": ["1-2"]}
    rows = addresses(page)
    assert rows
    assert {a.split(":")[0] for a in rows} <= {"1", "2"}
    assert {t.split()[-1] for t in page.locator("td.k-verdict .badge").all_inner_texts()} == {"suppresses"}
    page.reload()
    assert addresses(page) == rows
    assert page.locator("#layer").input_value() == "1-2"
    page.go_back()
    at_rest(page)
    assert "layer" not in query(page)
    assert page.locator("#layer").input_value() == ""


def test_sorting_by_the_keyboard(visit: Visit) -> None:
    page = visit("/?cols=effect")
    head = page.get_by_role("columnheader", name="effect")
    expect(head).to_have_attribute("aria-sort", "none")
    head.get_by_role("link").focus()
    for sort, order in (("-effect", "descending"), ("effect", "ascending")):
        page.keyboard.press("Enter")
        expect(head).to_have_attribute("aria-sort", order)
        assert query(page)["sort"] == [sort]
        values = [float(v.replace("−", "-")) for v in page.locator("td.k-signed .figure").all_inner_texts()]
        assert values == sorted(values, reverse=order == "descending")
        expect(head.get_by_role("link")).to_be_focused()  # it can be pressed again at once


def test_search_finds_by_word(visit: Visit) -> None:
    page = visit("/")
    page.locator("#q").fill("dog")
    page.wait_for_url(re.compile("q=dog"), timeout=60_000)
    at_rest(page)
    assert addresses(page)[0] == "0:0"
    page.locator("#q").fill("")
    expect(page.locator("#results [role=status]")).to_contain_text("72 neurons")


def test_the_box_in_the_head_goes_to_a_neuron(visit: Visit) -> None:
    page = visit("/map")
    page.locator("#go").fill("1:3")
    page.keyboard.press("Enter")
    page.wait_for_url("**/neuron/1:3")


def test_columns_are_chosen(visit: Visit) -> None:
    page = visit("/?cols=label,verdict")
    page.get_by_text("Columns", exact=True).click()
    page.get_by_role("checkbox", name="coherence").check()
    expect(page.get_by_role("columnheader", name="coherence")).to_be_visible()
    assert set(query(page)["cols"][0].split(",")) == {"label", "verdict", "coherence"}


def test_scrolling_on_brings_the_rest(visit: Visit) -> None:
    page = visit("/")
    assert len(addresses(page)) == 60
    page.get_by_role("link", name="More rows").scroll_into_view_if_needed()
    expect(page.locator("#results td a.address")).to_have_count(72)
    assert len(set(addresses(page))) == 72
    assert query(page) == {"rows": ["120"]}
    page.reload()
    assert len(addresses(page)) == 72


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_the_rows_can_be_taken_away(visit: Visit, kind: str) -> None:
    page = visit("/?layer=1&cols=label")
    with page.expect_download() as got:
        page.get_by_role("link", name=kind).click()
    assert got.value.suggested_filename == f"neurons.{kind.lower()}"
    data = got.value.path().read_bytes()
    assert data.startswith(b"PAR1") if kind == "Parquet" else data.count(b"\n") == 25


def test_a_phone_shows_cards(visit: Visit) -> None:
    page = visit("/", phone=True)
    cell = page.locator("#results tbody td").nth(2)
    assert cell.evaluate("e => getComputedStyle(e, '::before').content") == '"verdict"'
    boxes = [page.locator("#results tbody td").nth(i).bounding_box() for i in (0, 2)]
    assert boxes[0] and boxes[1] and boxes[1]["y"] > boxes[0]["y"]  # beneath, not beside  # noqa: PT018
    expect(page.locator("#layer")).to_be_hidden()
    page.get_by_text("Filters").tap()
    page.locator("#layer").fill("2")
    page.wait_for_url(re.compile("layer=2"))
    page.select_option("[name=sort]", "-effect")
    page.wait_for_url(re.compile("sort=-effect"))
    assert "layer=2" in page.url


# ------------------------------------------------------------------------------------------- SQL


def test_sql_is_asked_by_the_keyboard(visit: Visit) -> None:
    page = visit("/sql")
    page.locator("#sql").fill("SELECT layer, count(*) AS n FROM neurons GROUP BY layer ORDER BY layer")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#results tbody tr")).to_have_count(3)
    assert "sql" in query(page)
    page.get_by_role("link", name="layer").click()
    expect(page.locator("#results tbody td").first).to_have_text("2")


def test_the_filters_can_be_read_as_sql(visit: Visit) -> None:
    page = visit("/?verdict=promotes&sort=-effect&cols=effect")
    rows = addresses(page)
    page.get_by_role("link", name="as SQL").click()
    page.wait_for_url("**/sql?**")
    assert "WHERE verdict = 'promotes'" in page.locator("#sql").input_value()
    assert addresses(page) == rows


ATTACKS = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT content FROM read_text('/etc/hostname')",
    "COPY (SELECT 1) TO '/tmp/neuropil-owned'",
    "ATTACH '/tmp/neuropil-owned.db' AS x",
    "DROP VIEW neurons",
    "CREATE TABLE x AS SELECT 1",
    "INSTALL httpfs",
    "SET enable_external_access = true",
    "SELECT 1; SELECT 2",
    "SELECT * FROM duckdb_settings()",
    "SELECT 1) AS x; DROP VIEW neurons; SELECT * FROM (SELECT 1",
    "PRAGMA database_list",
    "SELECT getenv('HOME')",
]


def test_sql_that_attacks_is_refused(visit: Visit, server: Any) -> None:
    page = visit("/sql")
    for sql in ATTACKS:
        for sort in ("", "&sort=1"):
            answer = page.request.get(f"{server.url}/sql?sql={quote(sql)}{sort}")
            assert answer.status == 400, sql
            assert "root:" not in answer.text()
            for kind in ("csv", "parquet"):
                assert page.request.get(f"{server.url}/download/{kind}?sql={quote(sql)}{sort}").status == 400
    page.locator("#sql").fill(ATTACKS[0])
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.locator("#sql").fill("SELECT count(*) AS n FROM neurons")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#results tbody td")).to_have_text("72")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_markup_in_sql_and_in_its_answer_stays_text(visit: Visit) -> None:
    sql = "SELECT '<img src=x onerror=\"document.title=1\">' AS \"<b>x</b>\", label FROM neurons WHERE label LIKE '<%'"
    page = visit("/sql?sql=" + quote(sql))
    at_rest(page)
    expect(page.locator("#results tbody td").first).to_have_text('<img src=x onerror="document.title=1">')
    expect(page.get_by_role("columnheader").first).to_have_text("<b>x</b>")
    assert page.title() not in {"1", "owned"}
    assert page.locator("#results").locator("img, b, script").count() == 0


# ------------------------------------------------------------------------------------------- map


def ready(page: Page, column: str) -> None:
    expect(page.locator(f"#map[data-column='{column}']")).to_be_visible()


def test_the_map_by_keyboard(visit: Visit) -> None:
    page = visit("/map?column=effect")
    ready(page, "effect")
    where = page.locator("#where")
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    expect(where).to_contain_text("2:0")
    page.keyboard.press("PageDown")
    expect(where).to_contain_text("1:0")
    page.keyboard.press("End")
    expect(where).to_contain_text("1:23")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(where).to_contain_text(re.compile(r"1:\d+ .*effect"))
    address = where.locator("a").inner_text()
    assert address != "1:0"
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/neuron/{address}")


def test_the_map_by_mouse(visit: Visit, server: Any) -> None:
    page = visit("/map?column=effect&order=value")
    ready(page, "effect")
    page.locator("#map").hover(position={"x": 5, "y": 5})
    expect(page.locator("#tip")).to_be_visible()
    sql = "SELECT neuron FROM neurons WHERE layer = 2 ORDER BY effect DESC LIMIT 1"
    answer = page.request.get(f"{server.url}/download/csv?sql={quote(sql)}").text()
    address = answer.split()[1].strip('"')
    expect(page.locator("#tip b")).to_have_text(address)  # sorted by value: the largest stands first
    page.locator("#map").click(position={"x": 5, "y": 5})
    page.wait_for_url(f"**/neuron/{address}")


def test_the_map_by_touch(visit: Visit) -> None:
    page = visit("/map?column=verdict", phone=True, dark=True)
    ready(page, "verdict")
    page.locator("#map").tap(position={"x": 8, "y": 8})
    expect(page.locator("#where")).to_contain_text("2:")
    assert "/map" in page.url
    page.locator("#map").tap(position={"x": 8, "y": 8})
    page.wait_for_url("**/neuron/2:*")


def test_every_colouring_is_drawn(visit: Visit) -> None:
    page = visit("/map?column=verdict")
    ready(page, "verdict")
    inks = set()
    for column in ("verdict", "effect", "specialised", "coherence"):
        page.select_option("#column", column)
        ready(page, column)
        assert query(page)["column"] == [column]
        drawn = page.locator("#map").evaluate(
            "c => { const g = new OffscreenCanvas(c.width, c.height).getContext('2d', {willReadFrequently: true});"
            " g.drawImage(c, 0, 0); const d = g.getImageData(0, 0, c.width, c.height).data, s = new Set();"
            " for (let i = 0; i < d.length; i += 4) s.add(d[i] << 16 | d[i+1] << 8 | d[i+2]); return [...s]; }"
        )
        assert len(drawn) >= 3
        inks.add(frozenset(drawn))
    assert len(inks) == 4
    page.locator("#q").fill("dog")
    page.keyboard.press("Enter")
    expect(page.locator("#mapstate")).to_contain_text("ringed", timeout=60_000)


def test_the_colouring_chosen_last_is_drawn(visit: Visit) -> None:
    page = visit("/map?column=verdict")
    ready(page, "verdict")
    held: list[Any] = []
    page.route("**/map/values?column=effect", lambda route: held.append(route))  # an answer that comes late
    page.select_option("#column", "effect")
    page.select_option("#column", "specialised")
    ready(page, "specialised")
    held[0].continue_()
    at_rest(page)
    expect(page.locator("#map")).to_have_attribute("data-column", "specialised")
    expect(page.locator("#mapstate")).to_be_empty()


# ------------------------------------------------------------------------------------------- neuron


def test_a_neuron_tells_what_it_does(visit: Visit) -> None:
    page = visit("/neuron/0:0")
    expect(page.locator(".said")).to_contain_text("Suppresses “dog”")
    expect(page.locator(".said")).to_contain_text("suppresses what its weights point at")
    for verb in ("reads", "opens on", "writes"):
        expect(page.get_by_role("region", name=f"Tokens it {verb}")).to_be_visible()
    assert page.locator("[aria-label='Tokens it reads'] li").count() == 10
    expect(page.locator("#alike li")).not_to_have_count(0)
    page.get_by_role("link", name="0:1 →").click()
    page.wait_for_url("**/neuron/0:1")
    expect(page.locator("h1")).to_contain_text("<script>")
    assert page.get_by_role("link", name="← 0:0").get_attribute("rel") == "prev"


def test_neighbours_by_weight(visit: Visit) -> None:
    page = visit("/neuron/1:3")
    page.get_by_role("button", name="down column").click()
    expect(page.get_by_role("button", name="down column")).to_have_attribute("aria-pressed", "true", timeout=60_000)
    assert {a.split(":")[0] for a in page.locator("#alike .address").all_inner_texts()} == {"1"}
    page.get_by_role("button", name="in all layers").click()
    expect(page.get_by_role("button", name="in all layers")).to_have_attribute("aria-pressed", "true")
    assert len({a.split(":")[0] for a in page.locator("#alike .address").all_inner_texts()}) > 1


def test_where_it_fires(visit: Visit) -> None:
    page = visit("/neuron/1:3")
    page.locator("#text").fill("A dog <script>document.title='owned'</script>")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".strip .t").first).to_contain_text("A", timeout=60_000)  # the model loads meanwhile
    assert page.locator(".strip .t.peak").count() >= 1
    assert page.title() != "owned"
    expect(page.locator("#model")).to_contain_text("model ready")


@pytest.mark.parametrize(("path", "status"), [("/neuron/99:0", 404), ("/neuron/0:9999", 404),
                                              ("/neuron/<script>", 404), ("/nowhere", 404)])  # fmt: skip
def test_what_is_not_there(visit: Visit, server: Any, path: str, status: int) -> None:
    page = visit("/")
    answer = page.request.get(server.url + quote(path))
    assert answer.status == status
    assert "<script>" not in answer.text().replace("<script src=", "")
    assert "Traceback" not in answer.text()


# ------------------------------------------------------------------------------------------- playground


def test_the_playground_races_and_stops(visit: Visit, server: Any) -> None:
    page = visit("/playground")
    page.locator("#prompt").fill("The dog <b>chased</b>")
    page.locator("#offerq").fill("1:3")
    page.locator("#offer [data-add='1:3']").click()
    page.get_by_label("Value for neuron 1:3", exact=True).fill("40")
    page.wait_for_url(re.compile("1%3A3%3D40"))
    page.locator("#tokens").fill("8")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#state")).to_contain_text("done", timeout=60_000)
    expect(page.locator("#plain .said-before")).to_have_text("The dog <b>chased</b>")
    assert page.locator("#clamped span").count() > 1
    assert page.locator("#clamped .new.first").count() == 1

    page.locator("#tokens").fill("400")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#plain span").nth(4)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#state")).to_have_text("stopped")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.wait_for_timeout(500)
    lock = server.app.state.live._lock
    assert lock.acquire(timeout=5), "the model is still held after the visitor stopped"
    lock.release()


def test_the_playground_state_is_in_its_address(visit: Visit) -> None:
    page = visit("/playground?clamp=1:3=-12.5,2:4=7,99:1=3&prompt=Hello&where=up")
    assert page.get_by_label("Value for neuron 1:3", exact=True).input_value() == "-12.5"
    assert page.locator("#clamps li").count() == 2  # 99:1 is no neuron
    assert page.locator("#prompt").input_value() == "Hello"
    assert page.locator("#where").input_value() == "up"
    page.get_by_role("button", name="Remove neuron 2:4").click()
    assert query(page)["clamp"] == ["1:3=-12.5"]
    page.reload()
    assert page.locator("#clamps li").count() == 1


def test_without_a_model_the_rest_works(visit: Visit, modelless: Any) -> None:
    page = visit("/playground", at=modelless)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#trouble")).to_contain_text("no such file")
    expect(page.locator("#trouble")).to_contain_text("neuropil explore")
    expect(page.locator("#model")).to_contain_text("no model")
    page.goto(modelless.url + "/neuron/1:3")
    expect(page.locator(".said")).to_contain_text("Not checked causally")
    page.get_by_role("button", name="Show where it fires").click()
    expect(page.locator("#fires")).to_contain_text("no such file")
    page.get_by_role("button", name="up row").click()
    expect(page.locator("#alike")).to_contain_text("so this is by shared tokens")
    expect(page.locator("#alike .address")).not_to_have_count(0)
    page.goto(modelless.url + "/")
    assert len(addresses(page)) == 60
    expect(page.locator("#verdict")).to_have_count(0)


# ------------------------------------------------------------------------------------------- a vision model

EVERY_VISION_PAGE = [
    "/", "/neuron/0:1", "/neuron/1:5", "/map?column=preferred_class", "/bricks?site=1", "/diagram", "/playground",
    "/sql?sql=DESCRIBE+neurons",
]  # fmt: skip


@pytest.mark.parametrize("path", EVERY_VISION_PAGE)
@pytest.mark.parametrize("phone", [False, True])
def test_a_vision_page_fits_its_screen_and_runs_no_markup(visit: Visit, vision: Any, path: str, phone: bool) -> None:
    page = visit(path, phone=phone, dark=phone, at=vision)
    at_rest(page)
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide[0] <= wide[1], f"{path} scrolls sideways: {wide}"
    assert page.title() != "owned"
    assert page.locator("h1").count() == 1
    assert page.locator("main script, main style, main svg svg").count() == 0
    broken = page.evaluate("[...document.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src)")
    assert broken == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_pictures_that_drive_a_neuron_are_lit_where_they_do(visit: Visit, vision: Any, dark: bool) -> None:
    page = visit("/neuron/1:2", dark=dark, at=vision)
    at_rest(page)
    pictures = page.locator(".pictures img")
    expect(pictures).to_have_count(15)
    pictures.last.scroll_into_view_if_needed()
    at_rest(page)
    light = page.evaluate(
        """async () => {
      const made = [];
      for (const e of [...document.querySelectorAll('.pictures img')].slice(0, 6)) {
        const whole = new Image(); whole.src = e.parentElement.href; await whole.decode(); await e.decode();
        const sum = (im) => { const c = document.createElement('canvas'); c.width = c.height = 56;
          const g = c.getContext('2d'); g.drawImage(im, 0, 0, 56, 56);
          return [...g.getImageData(0, 0, 56, 56).data].filter((_, i) => i % 4 === 0).reduce((a, b) => a + b, 0); };
        made.push([sum(e), sum(whole), e.naturalWidth]);
      }
      return made;
    }"""
    )
    for lit, whole, width in light:  # some of it is dimmed, not all, and it is drawn larger than it is kept
        assert 0.15 * whole < lit < 0.95 * whole
        assert width >= 168
    peaks = [float(v) for v in page.locator(".pictures .figure").all_inner_texts()]
    assert peaks == sorted(peaks, reverse=True)
    expect(page.locator(".described")).to_contain_text("sleeves and edges 2")
    assert "nats" in page.locator("section[aria-label='What it does']").inner_text()
    assert page.locator("section[aria-label='How it answers'] .gauge").count() == 2
    expect(page.locator("#alike li").first.locator("a.address")).to_have_text(re.compile(r"\d+:\d+"))
    expect(page.get_by_role("button", name="shared images")).to_have_attribute("aria-pressed", "true")
    whole = page.request.get(vision.url + str(page.locator(".pictures a").first.get_attribute("href")))
    assert whole.headers["content-type"] == "image/png"


def test_a_dead_neuron_says_so_and_shows_no_pictures(visit: Visit, vision: Any) -> None:
    page = visit("/neuron/1:5", at=vision)
    at_rest(page)
    expect(page.locator(".chip.caution")).to_have_text("dead")
    expect(page.locator(".exemplars")).to_contain_text("it is dead")
    assert page.locator(".pictures").count() == 0


def test_the_vision_table_shows_pictures_and_filters(visit: Visit, vision: Any) -> None:
    page = visit("/", at=vision)
    at_rest(page)
    assert page.locator("#results td.k-images img").count() > 20
    heads = page.locator("#results th").all_inner_texts()
    assert {"neuron", "exemplar_images", "description", "preferred_class", "selectivity", "brick"} <= set(heads)
    assert "exemplar_masks" not in page.locator(".chooser").inner_text()
    page.select_option("#site", "1")
    page.wait_for_url(re.compile("site=1"))
    at_rest(page)
    assert {a.split(":")[0] for a in addresses(page)} == {"1"}
    page.locator("#q").fill("edges 2")
    page.wait_for_url(re.compile("q=edges"))
    at_rest(page)
    assert addresses(page)[:2] == ["1:11", "1:8"]  # both words, the best description first
    page.goto(vision.url + "/?dead=yes")
    assert "1:5" in addresses(page)


def test_the_vision_map_takes_a_class_as_a_colour(visit: Visit, vision: Any) -> None:
    page = visit("/map", at=vision)
    page.locator("#map[data-column=preferred_class]").wait_for()
    names = page.locator("#legend button").all_inner_texts()
    assert len(names) > 2
    expect(page.locator("#sharenote")).to_have_text("Right: how each layer divides")
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/neuron/\d+:\d+"))


def test_bricks_are_listed_with_their_function_and_lead_to_their_neurons(visit: Visit, vision: Any) -> None:
    page = visit("/bricks?site=1", at=vision)
    expect(page.locator(".bricklist li")).to_have_count(4)
    first = page.locator(".bricklist li").first
    assert re.search(r"3\s+neurons", first.inner_text())
    serving = page.locator(".bricklist li.serving")
    expect(serving).to_have_count(2)
    assert "<script>" in serving.all_inner_texts()[0] + serving.all_inner_texts()[1]  # as text
    page.get_by_role("link", name="Brick 0").click()
    at_rest(page)
    assert query(page) == {"site": ["1"], "brick": ["0"]}
    assert addresses(page) == ["1:0", "1:1", "1:2"]
    page.goto(vision.url + "/bricks?site=2&function=footwear")
    expect(page.locator(".bricklist li")).to_have_count(1)
    page.get_by_role("link", name="all neurons in bricks for footwear").click()
    at_rest(page)
    assert {a.split(":")[0] for a in addresses(page)} == {"1", "2"}
    page.locator("a.address").first.click()
    expect(page.locator(".chips")).to_contain_text("brick 0: footwear")


@pytest.mark.parametrize("phone", [False, True])
def test_the_diagram_leads_from_a_layer_to_its_neurons(visit: Visit, vision: Any, phone: bool) -> None:
    page = visit("/diagram", phone=phone, dark=phone, at=vision)
    drawing = page.locator("#drawing svg.np-diagram")
    drawing.wait_for()
    at_rest(page)
    ink = page.evaluate("getComputedStyle(document.querySelector('.np-title')).fill")
    light = sum(map(int, re.findall(r"\d+", ink)[:3])) > 500
    assert light == phone  # its style sheet came, and goes by the reader's setting
    links = page.evaluate("[...document.querySelectorAll('#drawing a')].map(e => e.getAttribute('href'))")
    assert {"/?site=0", "/?site=1", "/?site=2"} <= set(links)
    page.locator('#drawing a[href="/?site=1"]').first.click()
    page.wait_for_url(re.compile("site=1"))
    at_rest(page)
    assert {a.split(":")[0] for a in addresses(page)} == {"1"}
    page.go_back()
    page.get_by_role("link", name="2", exact=True).click()
    page.wait_for_url(re.compile("site=2"))


def test_pages_without_anything_say_what_brings_it(visit: Visit, modelless: Any) -> None:
    page = visit("/bricks", at=modelless)
    expect(page.locator(".empty-page")).to_contain_text("neuropil bricks")
    page = visit("/diagram", at=modelless)
    expect(page.locator("#drawing")).to_contain_text("neuropil explore")


def test_the_diagram_of_a_language_model_is_drawn_from_the_model(visit: Visit, server: Any) -> None:
    page = visit("/diagram?fold=false&depth=2")
    page.locator("#drawing svg.np-diagram").wait_for(timeout=60_000)
    links = page.evaluate("[...document.querySelectorAll('#drawing a')].map(e => e.getAttribute('href'))")
    assert {"/?site=0", "/?site=1", "/?site=2"} <= set(links)
