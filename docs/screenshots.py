"""Pictures of the explorer's real pages for the README and the site.

    python docs/screenshots.py ATLAS [--out docs/images] [--model NAME]

The pictures are those of a language model's atlas, or, where ATLAS is of a vision model, of its table, a neuron, its
bricks and its diagram.

Serves the atlas on this machine, looks at it in a headless Chromium (the system's, driven by playwright) and writes
PNG files. Nothing is drawn by hand and nothing comes from the network. The pages with live features load the model.
"""

from __future__ import annotations

import argparse
import io
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--force-color-profile=srgb"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE = (1280, 800), (390, 844)
PATIENCE = 180_000  # milliseconds: the model has to load first
TEXT = "We missed the plane, so we sat in the garden with the dog and talked of money, music, France and {label}."
SQL = """SELECT neuron, label, effect, cos_up, cos_gate, cos_down
FROM neurons
WHERE confirmed AND specialised AND NOT hub AND sign(cos_up) <> sign(effect)
ORDER BY abs(effect) DESC
LIMIT 50"""


@contextmanager
def serving(atlas: Path, model: str | None) -> Iterator[str]:
    """The explorer on a free port of this machine; gives its address."""
    import uvicorn

    from neuropil.explorer import create_app

    with socket.socket() as ears:
        ears.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(atlas, model), log_level="warning"))
        thread = threading.Thread(target=server.run, args=([ears],), daemon=True)
        thread.start()
        while not server.started:
            if not thread.is_alive():
                raise SystemExit("the explorer did not start")
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{ears.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def strongest(atlas: Path) -> tuple[str, str, float]:
    """A neuron worth showing, its label and a value that turns its word up: specialised, confirmed, no hub."""
    from neuropil.atlas import Atlas

    with Atlas.open(atlas) as opened:
        known = opened.columns
        order, value = ("abs(effect)", "clamp_value * sign(effect)") if "effect" in known else ("specialisation", "10")
        sure = "AND confirmed" if "confirmed" in known else ""
        rows = opened.query(
            f"SELECT neuron, label, {value} AS value FROM neurons WHERE specialised AND NOT hub {sure} "
            f"AND regexp_full_match(label, '[A-Za-z]{{3,}}') ORDER BY {order} DESC",
            limit=1,
        ).to_pylist()
    if not rows:
        raise SystemExit(f"{atlas} has no specialised neuron to show")
    return rows[0]["neuron"], rows[0]["label"], round(float(rows[0]["value"]) / 4, 1)


def sees(atlas: Path) -> bool:
    """Whether the atlas is of a vision model."""
    from neuropil.atlas import Atlas

    with Atlas.open(atlas) as opened:
        return "exemplar_images" in opened.columns


def vivid(atlas: Path) -> str:
    """A neuron of a vision model worth showing: it has regions, and one class or its description tells it best."""
    from neuropil.atlas import Atlas

    with Atlas.open(atlas) as opened:
        known = opened.columns
        order = [
            f"{name} DESC NULLS LAST" for name in ("description_score", "selectivity", "ablation") if name in known
        ]
        rows = opened.query(
            "SELECT neuron FROM neurons WHERE NOT dead AND activation_max > threshold AND sparsity < 0.99 "
            "AND NOT list_contains(exemplar_masks, repeat('f', 196)) "
            f"ORDER BY {', '.join([*order, 'site DESC', 'index'])}",
            limit=1,
        ).to_pylist()
    if not rows:
        raise SystemExit(f"{atlas} has no neuron with regions to show")
    return str(rows[0]["neuron"])


def vision_shots(neuron: str) -> list[tuple[str, str, tuple[int, int], bool, bool, Callable[[Any], None]]]:
    """name, address, size, dark, whole page, what to do first."""
    return [
        ("vision-table", "/", DESK, False, False, at_rest),
        ("vision-neuron", f"/neuron/{neuron}", DESK, False, True, at_rest),
        ("vision-neuron-phone", f"/neuron/{neuron}", PHONE, True, False, at_rest),
        ("bricks", "/bricks", DESK, False, False, at_rest),
        ("diagram", "/diagram", DESK, False, False, drawn),
        ("diagram-dark", "/diagram?depth=2", DESK, True, False, drawn),
    ]


def drawn(page: Any) -> None:
    page.locator("#drawing svg.np-diagram").wait_for(timeout=PATIENCE)
    at_rest(page)


def at_rest(page: Any) -> None:
    page.wait_for_load_state("networkidle", timeout=PATIENCE)


def point_at_map(page: Any) -> None:
    at_rest(page)
    page.locator("#map[data-column]").wait_for(timeout=PATIENCE)
    page.locator("#map").hover(position={"x": 420, "y": 60})


def tap_map(page: Any) -> None:
    at_rest(page)
    page.locator("#map[data-column]").wait_for(timeout=PATIENCE)


def fire(page: Any) -> None:
    label = page.locator("h1 .word").inner_text().strip("“”")
    page.locator("#text").fill(TEXT.format(label=label))
    page.get_by_role("button", name="Show where it fires").click()
    page.locator(".strip").wait_for(timeout=PATIENCE)
    page.locator("#alike li").first.wait_for(timeout=PATIENCE)
    page.mouse.move(0, 0)


def race(page: Any) -> None:
    page.locator("#tokens").fill("48")
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("done,").wait_for(timeout=PATIENCE)
    page.mouse.move(0, 0)


def shots(
    neuron: str, label: str, value: float
) -> list[tuple[str, str, tuple[int, int], bool, bool, Callable[[Any], None]]]:
    """name, address, size, dark, whole page, what to do first."""
    clamp = f"/playground?clamp={neuron}={value:g}&prompt=Yesterday+I+saw"
    return [
        ("table", "/?specialised=yes&hub=no&sort=-specialisation", DESK, False, False, at_rest),
        ("table-dark", "/?q=" + label, DESK, True, False, at_rest),
        ("table-phone", "/?specialised=yes&hub=no&sort=-specialisation", PHONE, False, False, at_rest),
        ("map", "/map?column=specialisation", DESK, False, True, point_at_map),
        ("map-verdict-dark", "/map?column=verdict", DESK, True, True, point_at_map),
        ("map-phone", "/map?column=specialised", PHONE, True, False, tap_map),
        ("neuron", f"/neuron/{neuron}", DESK, False, True, fire),
        ("neuron-phone", f"/neuron/{neuron}", PHONE, True, False, at_rest),
        ("playground", clamp, DESK, False, False, race),
        ("sql", "/sql?sql=" + quote(SQL), DESK, False, False, at_rest),
    ]  # fmt: skip


def save(picture: bytes, path: Path) -> None:
    """Write a PNG of 256 colours, which such pages do not miss: a third of the size."""
    from PIL import Image

    small = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("atlas", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--model", help="what the live pages run; default: the model that was mapped")
    parser.add_argument("--only", help="comma-separated names of the pictures to make")
    given = parser.parse_args()
    chromium = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        chromium = None
    if chromium is None:
        raise SystemExit("needs the system's chromium (apt install chromium) and `pip install playwright`")
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = set(given.only.split(",")) if given.only else None
    with serving(given.atlas, given.model) as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        wanted_shots = vision_shots(vivid(given.atlas)) if sees(given.atlas) else shots(*strongest(given.atlas))
        for name, path, (width, height), dark, whole, act in wanted_shots:
            if wanted and name not in wanted:
                continue
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme="dark" if dark else "light",
                device_scale_factor=2 if width < 600 else 1.5,
                is_mobile=width < 600,
                has_touch=width < 600,
                reduced_motion="reduce",
            )
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(url + path)
            act(page)
            save(page.screenshot(full_page=whole), given.out / f"explorer-{name}.png")
            context.close()
            print(given.out / f"explorer-{name}.png", file=sys.stderr)
        browser.close()


if __name__ == "__main__":
    main()
