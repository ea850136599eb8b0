"""How `find_sites` recognises layers of neurons."""

from __future__ import annotations

from torch import nn

from neuropil.neurons import Site, Tap, Weight

_NAMES = {
    "up": ("up_proj", "fc1", "c_fc", "w3", "wi_1", "dense_h_to_4h"),
    "gate": ("gate_proj", "w1", "wi_0"),
    "down": ("down_proj", "fc2", "c_proj", "w2", "wo", "dense_4h_to_h"),
}


def _axis(module: nn.Module) -> int:
    return 1 if type(module).__name__ == "Conv1D" else 0


def recognise(model: nn.Module) -> list[Site]:
    sites: list[Site] = []
    for name, module in model.named_modules():
        dot = name + "." if name else ""
        if isinstance(module, nn.Sequential):
            linears = [(n, m) for n, m in module.named_children() if isinstance(m, nn.Linear)]
            for (a, up), (b, _) in zip(linears, linears[1:], strict=False):
                act = next((type(m).__name__.lower() for n, m in module.named_children() if int(a) < int(n) < int(b)), None)
                sites.append(_site(len(sites), dot + a, {"up": dot + a}, dot + b, up.out_features, act, {}))
            continue
        children = dict(module.named_children())
        roles = {r: n for r, names in _NAMES.items() for n in names if n in children}
        if "up" in roles and "down" in roles:
            axes = {dot + n: _axis(children[n]) for n in roles.values()}
            width = children[roles["down"]].weight.shape[1 - _axis(children[roles["down"]])]
            reads = {r: dot + roles[r] for r in ("up", "gate") if r in roles}
            sites.append(_site(len(sites), name, reads, dot + roles["down"], width, None, axes))
    return sites


def _site(number: int, name: str, reads: dict[str, str], down: str, width: int, act: str | None, axes: dict[str, int]) -> Site:
    weights = {r: Weight(f"{n}.weight", axes.get(n, 0)) for r, n in reads.items()}
    kind = "gated" if "gate" in reads else "dense"
    write = Weight(f"{down}.weight", 1 - axes.get(down, 0))
    return Site(name, number, number, width, kind, weights, write, Tap(down), Tap(reads["up"], "output"), act)
