"""The functions of one number and of several that elementwise boxes apply, with their derivatives.

`code` is the text of the value in PyTorch; {0}, {1} are the arguments and {n} the box's own number. `slopes` has,
for each argument, the text of its gradient from the arguments, the box's value {y} and the gradient {g} of that
value.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """One function, as text that can be compiled and shown."""

    code: str
    slopes: tuple[str, ...]
    symbol: str = ""


FUNCTIONS = {
    "relu": Function("torch.relu({0})", ("{g} * ({0} > 0)",)),
    "gelu": Function(
        "F.gelu({0})",
        ("{g} * (0.5 + 0.5 * torch.erf({0} / 2**0.5) + {0} * torch.exp(-{0} * {0} / 2) / (2 * torch.pi) ** 0.5)",),
    ),
    "silu": Function("F.silu({0})", ("{g} * torch.sigmoid({0}) * (1 + {0} * (1 - torch.sigmoid({0})))",)),
    "sigmoid": Function("torch.sigmoid({0})", ("{g} * {y} * (1 - {y})",)),
    "tanh": Function("torch.tanh({0})", ("{g} * (1 - {y} * {y})",)),
    "exp": Function("torch.exp({0})", ("{g} * {y}",)),
    "log": Function("torch.log({0})", ("{g} / {0}",)),
    "rsqrt": Function("torch.rsqrt({0})", ("-0.5 * {g} * {y} / {0}",)),
    "square": Function("{0} * {0}", ("2 * {g} * {0}",), "x²"),
    "scale": Function("{n} * {0}", ("{n} * {g}",), "×"),
    "shift": Function("{0} + {n}", ("{g}",), "+"),
    "add": Function("{0} + {1}", ("{g}", "{g}"), "+"),
    "sub": Function("{0} - {1}", ("{g}", "-{g}"), "−"),
    "mul": Function("{0} * {1}", ("{g} * {1}", "{g} * {0}"), "×"),
    "div": Function("{0} / {1}", ("{g} / {1}", "-{g} * {y} / {1}"), "÷"),
}


def arguments(name: str) -> int:
    return len(FUNCTIONS[name].slopes)


def reads(name: str, argument: int) -> tuple[str, ...]:
    """What the gradient of an argument needs, in this order: "0", "1" (arguments) and "y" (the value)."""
    text = FUNCTIONS[name].slopes[argument]
    return tuple(key for key in ("0", "1", "y") if "{" + key + "}" in text)
