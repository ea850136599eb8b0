"""What the numbers of one neuron say, in plain words, and where its bars go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = {
    "up": ("reads", "up-projection row: what it looks for in the stream"),
    "gate": ("opens on", "gate row: what lets it through"),
    "down": ("writes", "down-projection column: what it adds to the stream"),
}


def number(value: Any, digits: int = 3) -> str:
    """A number as people read it: three significant digits, a true minus, no exponents when avoidable.

    >>> number(-0.12345), number(46080), number(None), number(3.0)
    ('−0.123', '46,080', '–', '3.00')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}".replace("-", "−")


def shown(token: Any) -> str:
    """A token with what the eye would miss made visible: spaces, tabs, line ends, control characters.

    >>> shown(" dog"), shown("a\\n"), shown(""), shown("\\x07")
    ('␣dog', 'a↵', '∅', '\\\\x07')
    """
    text = str(token)
    if not text:
        return "∅"
    marks = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
    return "".join(marks.get(c, c if c.isprintable() else _escaped(c)) for c in text)


def _escaped(c: str) -> str:
    return f"\\x{ord(c):02x}" if ord(c) < 256 else f"\\u{ord(c):04x}"


@dataclass(frozen=True)
class Verdict:
    kind: str  # "promotes" | "suppresses" | "no effect" | "unmeasured"
    head: str
    body: str


def named(row: Mapping[str, Any]) -> str:
    """The word the neuron is spoken of by: its label, or else the token it matches best, in quotes.

    >>> named({"label": "dog"}), named({"label": "", "up_tokens": [" cat"]})
    ('“dog”', '“␣cat”')
    """
    if word := row.get("label"):
        return f"“{shown(word)}”"
    side = "_neg" if (row.get("label_sign") or 1) < 0 else ""
    tokens = row.get(f"{row.get('label_from') or 'up'}{side}_tokens")
    return f"“{shown(tokens[0])}”" if tokens else "its top token"


def _close(a: float, b: float) -> str:
    return f"{number(a)} ± {number(b)}"


WEIGHTS = {"up": "up row", "gate": "gate row", "down": "down column"}


def verdict(row: Mapping[str, Any]) -> Verdict:
    """The causal check in a sentence or two, with the trap named where the neuron is one.

    >>> verdict({"label": "dog", "verdict": None}).kind
    'unmeasured'
    >>> verdict({"label": "dog", "verdict": "suppresses", "label_from": "gate"}).body
    'Its gate row points at “dog”, yet turned up it makes “dog” less likely: it suppresses what its weights point at.'
    """
    name, said = named(row), row.get("verdict")
    if said is None:
        return Verdict(
            "unmeasured",
            "Not checked causally",
            "No clamp has been measured for this neuron, so its label says only what its weights point at, "
            "not what it does.",
        )
    away = (row.get("label_sign") or 1) < 0
    points = (
        f"Its {WEIGHTS.get(row.get('label_from') or 'up', 'weights')} points {'away from' if away else 'at'} {name}"
    )
    less, more = f"turned up it makes {name} less likely", f"turned up it makes {name} more likely"
    head, body = {
        ("promotes", False): (f"Promotes {name}", f"{points}, and {more}."),
        ("promotes", True): (f"Promotes {name}", f"{points}, yet {more}."),
        ("suppresses", False): (
            f"Suppresses {name}",
            f"{points}, yet {less}: it suppresses what its weights point at.",
        ),
        ("suppresses", True): (f"Suppresses {name}", f"{points}, and {less}."),
    }.get(
        (str(said), away),
        (f"No effect on {name}", f"{points}, but clamping it moves {name} no more than chance would."),
    )
    kind = str(said) if said in {"promotes", "suppresses"} else "no effect"
    return Verdict(kind, head, f"{body} {_measured(row, name)}".strip())


def _measured(row: Mapping[str, Any], name: str) -> str:
    effect, error = row.get("effect"), row.get("effect_se")
    control, spread = row.get("control"), row.get("control_se")
    if effect is None or error is None:
        return ""
    said = f"To either side, the clamp moves the logit of {name} by {_close(effect, error)}"
    if control is not None and spread is not None:
        said += f", those of matched random tokens by {_close(control, spread)}"
    return said + "."


def signs(row: Mapping[str, Any]) -> str:
    """What the three cosines say of the neuron's way of working, as far as they are beyond chance.

    >>> pet = {"label": "dog", "label_from": "up", "specialisation": 2.3}
    >>> signs(pet | {"cos_up": -.46, "cos_gate": .27, "cos_down": .33})
    'Beyond chance, it reads against “dog”, opens on it and writes towards it. So where the word is present and the gate is open, its output turns negative and takes the word away.'
    >>> signs(pet | {"cos_up": -.46, "cos_gate": .02, "cos_down": .03})
    'Beyond chance, it reads against “dog”.'
    """  # noqa: E501
    chance = null99(row)
    cos = {r: v for r in ROLES if (v := row.get(f"cos_{r}")) is not None and abs(v) > (chance or 0.0)}
    if not cos or chance is None:
        return ""
    verbs = {"up": ("reads towards", "reads against"), "gate": ("opens on", "closes on"),
             "down": ("writes towards", "writes against")}  # fmt: skip
    parts = [verbs[r][v < 0] for r, v in cos.items()]
    name = named(row)
    listed = [f"{verb} {name if i == 0 else 'it'}" for i, verb in enumerate(parts)]
    said = f"Beyond chance, it {' and '.join([', '.join(listed[:-1]), listed[-1]] if listed[1:] else listed)}."
    if "up" not in cos or "down" not in cos:
        return said
    end = "adds more of it"
    if cos["up"] * cos["down"] < 0:
        end = "turns negative and takes the word away" if cos["up"] < 0 else "is positive and takes the word away"
    return f"{said} So where the word is present and the gate is open, its output {end}."


@dataclass(frozen=True)
class Bar:
    token: str
    score: float
    share: float  # of the widest bar, 0..1


@dataclass(frozen=True)
class Panel:
    role: str
    verb: str
    note: str
    label: str
    towards: list[Bar]
    against: list[Bar]
    tick: float | None  # where the null's 99th percentile lies, as a share
    percentile: float | None
    norm: float | None
    hubs: int | None


def panels(row: Mapping[str, Any], null99: float | None) -> list[Panel]:
    """The token lists of every weight that was decoded, all on one scale so that they can be compared."""
    roles = [r for r in ROLES if row.get(f"{r}_tokens") is not None]
    every = [abs(s) for r in roles for side in ("", "_neg") for s in row.get(f"{r}{side}_scores") or []]
    widest = max(every, default=0.0) or 1.0
    made = []
    if null99 is not None and not _listed_are_cosines(row):
        null99 = None
    for role in roles:
        sides = [
            [
                Bar(shown(t), s, abs(s) / widest)
                for t, s in zip(
                    row.get(f"{role}{side}_tokens") or [], row.get(f"{role}{side}_scores") or [], strict=False
                )
            ]
            for side in ("", "_neg")
        ]
        made.append(
            Panel(
                role=role,
                verb=ROLES[role][0],
                note=ROLES[role][1],
                label=row.get(f"{role}_label") or "",
                towards=sides[0],
                against=sides[1],
                tick=null99 / widest if null99 and null99 < widest else None,
                percentile=row.get(f"{role}_null"),
                norm=row.get(f"{role}_norm"),
                hubs=row.get(f"{role}_hub_tokens"),
            )
        )
    return made


def silenced(row: Mapping[str, Any]) -> str:
    """What silencing a neuron of a vision model did, in a sentence.

    >>> silenced({"ablation": 0.5, "ablation_se": 0.1})
    'Without it the model gives the right class 0.500 ± 0.100 nats less: it supports it.'
    >>> silenced({"ablation": 0.01, "ablation_se": 0.1})
    'Without it the model gives the right class 0.0100 ± 0.100 nats less, which may be chance.'
    >>> silenced({"ablation": None, "ablation_estimate": -0.2})
    'It was not silenced; from its gradient one expects that the model would give the right class 0.200 nats more.'
    """
    loss, error, expected = row.get("ablation"), row.get("ablation_se"), row.get("ablation_estimate")
    if loss is None:
        if expected is None:
            return ""
        more = f"{number(abs(expected))} nats {'less' if expected > 0 else 'more'}"
        return f"It was not silenced; from its gradient one expects that the model would give the right class {more}."
    if not loss and not error:
        return "Without it the model is as before."
    size = number(abs(loss)) if error is None else _close(abs(loss), error)
    said = f"Without it the model gives the right class {size} nats {'less' if loss >= 0 else 'more'}"
    if error is not None and abs(loss) <= 2 * error:
        return f"{said}, which may be chance."
    return f"{said}: it {'supports' if loss >= 0 else 'works against'} it."


def null99(row: Mapping[str, Any]) -> float | None:
    """The null's 99th percentile of the best cosine, recovered from the specialisation score."""
    score, best = row.get("specialisation"), row.get(f"cos_{row.get('label_from') or 'up'}")
    return abs(best) / score if score and best is not None else None


def _listed_are_cosines(row: Mapping[str, Any]) -> bool:
    """Whether the listed scores are on the null's scale (an atlas may list dot products instead)."""
    role = row.get("label_from") or "up"
    best, tops = row.get(f"cos_{role}"), [row.get(f"{role}{side}_scores") or [0.0] for side in ("", "_neg")]
    return best is not None and any(abs(abs(top[0]) - abs(best)) < 1e-3 for top in tops)


@dataclass(frozen=True)
class Mark:
    """A measured value with twice its standard error to either side, placed on an axis from 0 to 100."""

    name: str
    value: float
    error: float | None
    at: float
    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Axis:
    marks: list[Mark]
    zero: float
    ticks: list[tuple[float, str]]


def axis(named: list[tuple[str, float | None, float | None, str]]) -> Axis | None:
    """Place values and errors on one axis that holds zero and them all."""
    known = [(n, float(v), e, k) for n, v, e, k in named if v is not None and math.isfinite(v)]
    if not known:
        return None
    ends = [v + s * 2 * (e or 0.0) for _, v, e, _ in known for s in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    pad = 0.08 * ((high - low) or 1.0)
    low, high = low - pad, high + pad

    def place(x: float) -> float:
        return round(100 * (x - low) / (high - low), 3)

    marks = [Mark(n, v, e, place(v), place(v - 2 * (e or 0)), place(v + 2 * (e or 0)), k) for n, v, e, k in known]
    step = _step((high - low) / 5)
    first = math.ceil(low / step)
    ticks = [
        (place(i * step), f"{round(i * step, 10):g}".replace("-", "−"))
        for i in range(first, math.floor(high / step) + 1)
    ]
    return Axis(marks, place(0.0), ticks)


def _step(rough: float) -> float:
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(m * scale for m in (1, 2, 5, 10) if m * scale >= rough * 0.999)
