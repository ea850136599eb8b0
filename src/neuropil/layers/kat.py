r"""MLPs with activations that learn their own shape, at the cost of 38 more parameters a layer.

A Kolmogorov-Arnold network puts a learnable function on every edge; splines there are slow, many, and badly scaled. A
group-rational KAN keeps one rational function F for each group of input channels, and one weight for each edge:

$$y_o = \sum_i w_{oi}\, F_{group(i)}(x_i) + b_o, \qquad
F(x) = \frac{a_0 + a_1 x + \dots + a_5 x^5}{1 + |b_1||x| + |b_2||x|^2 + |b_3||x|^3 + |b_4||x|^4}.$$

That is a linear map after an activation (`GroupRational`), here with a backward pass written by hand, so that it keeps
no more memory than a GELU. `GRKAN` is the layer, `GRKANMlp` a transformer's MLP of two (with timm's arguments), `KAT`
the whole vision transformer, and `replace` puts rationals into a model you have, at the functions and weights it has:

>>> layer = GRKAN(64, 10)
>>> layer(torch.randn(2, 7, 64)).shape
torch.Size([2, 7, 10])
>>> mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
>>> changes = replace(mlp)
>>> print(changes)
changed 2 modules
>>> x = torch.randn(5, 16)
>>> torch.allclose(changes.model(x), mlp(x), atol=1e-2)
True

New layers begin with weights that keep the variance: $w \sim N(0, \alpha / d_{in})$, $\alpha = E[x^2] / E[F(x)^2]$ for
normal x (`gain`), bias 0. `fit_rational` finds coefficients for any function under the denominator that is used.

Where the paper, its code and its kernels differ:

- The denominator. Above is what the authors' kernels train (`denominator="A"`, the default here); the paper writes
  $1 + |b_1 x + \dots + b_4 x^4|$ (`"B"`). A third form in their code for CPUs can be 0 and is not here. Their
  tables of coefficients for "gelu", "geglu" and "swishglu" belong to B and are wrong by up to 1.5 under A; here each
  table stands under its own denominator, and the rest is fitted.
- What groups share. The code shares the numerator (`share="numerator"`, the default: it gives the paper's own count
  of 6 + 4g and fits the checkpoints); the text says the denominator; `"none"` shares nothing.
- The initialisation. `weight_init="paper"` is the one above. In the released code a misplaced `else` overwrites it by a
  normal of deviation 0.02 cut at 2, and attention begins as in "mimetic initialization": `"released"`.
- $\alpha$ is computed by quadrature (2.811 for swish); the paper's 2.8178 is one draw of a million samples.
- sign(0) is 1 in the derivatives by x and b, as in the kernels; with 0 a $b_j$ that begins at 0 would stay there.
- The MLP's argument `norm_layer` is accepted by the released code and never called; here it raises.

A fit is good on [-3, 3] and not beyond: the authors' rational for GELU gives 6.3 at 6 and 12.5 at 10.
`replace(inputs=...)` warns where a model's activations go there. Gated MLPs are not in the paper; `replace` changes
their activation alone. The layer of B-splines that it is compared with is in `neuropil.layers.bspline_kan`.

Source: Xingyi Yang, Xinchao Wang, "Kolmogorov-Arnold Transformer", ICLR 2025, arXiv:2409.10594.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.evaluate import evaluating
from neuropil.layers._kat_fit import Fit, fit_rational, gain
from neuropil.layers._kat_mlp import GRKAN, GRKANMlp
from neuropil.layers._kat_model import KAT, KATBlock, kat_base, kat_small, kat_tiny
from neuropil.layers._kat_rational import GroupRational, rational
from neuropil.neurons import Site, find_sites

__all__ = [
    "GRKAN",
    "KAT",
    "Fit",
    "GRKANMlp",
    "GroupRational",
    "KATBlock",
    "fit_rational",
    "gain",
    "kat_base",
    "kat_small",
    "kat_tiny",
    "rational",
    "replace",
]

Where = Callable[[str, nn.Module], bool]
BEYOND = 0.01  # share of inputs outside the fit above which `replace` warns


def replace(
    model: nn.Module,
    where: Where | None = None,
    *,
    groups: int = 8,
    denominator: str = "A",
    share: str = "numerator",
    interval: tuple[float, float] = (-3.0, 3.0),
    inputs: Any = None,
) -> Changes:
    """A copy of `model` whose MLPs are GR-KANs: a rational before their first linear map, one for their activation.

    All weights are kept. The first rational begins as the identity and the second as the model's own activation,
    fitted on `interval`, so the copy computes what the model did, up to the error of the fit. MLPs are found by
    structure (`neuropil.neurons.find_sites`), in any architecture. Names in the state dict stay; `act.*` and the
    activation's coefficients come to it.

    where     chooses among the activations by name and module; all by default
    groups, denominator, share    see `GroupRational`
    interval  where the activations are fitted; a wider one costs accuracy within
    inputs    a batch (a tensor, a tuple of arguments or a mapping of keywords): warns (UserWarning) of activations
              more than 1 % of whose inputs lie outside `interval`, where the fit ends

    `Changes.left` names each layer of neurons that was left as it was and why: its activation is no module, is shared
    with another layer or has parameters, its neurons do not divide into groups, and so on. Raises `NoNeurons` where
    the model has no layer of neurons, ValueError for arguments that `GroupRational` refuses.
    """
    original, model = model, deepcopy(model).eval()  # what is random in training hides the structure
    options: dict[str, Any] = {"groups": groups, "denominator": denominator, "share": share}
    GroupRational(groups, init="identity", **options)  # refuses bad arguments whatever the model holds
    changed: list[str] = []
    left: dict[str, str] = {}
    found = {site: _activation(model, site, interval) for site in find_sites(model)}
    names = [name for name, _ in found.values()]
    for site, (name, reason) in found.items():
        if not reason and names.count(name) > 1:
            reason = f"its activation {name} serves other layers too"
        elif not reason and site.width % groups:
            reason = f"its {site.width} neurons do not divide into {groups} groups"
        elif not reason and where is not None and not where(name, model.get_submodule(name)):
            reason = "not chosen by `where`"
        if reason:
            left[site.name] = reason
            continue
        fit = fit_rational(model.get_submodule(name), interval, denominator=denominator)
        like = model.get_parameter(site.reads["up"].name)
        start = (fit.numerator, fit.denominator)
        new = GroupRational(site.width, init=start, device=like.device, dtype=like.dtype, **options)
        model.set_submodule(name, new)
        changed.append(name)
        if site.kind == "dense":
            up, reason = _put_before(model, site, options)
            left |= {up: reason} if reason else {}
            changed += [] if reason else [up]
    if inputs is not None:
        _warn_beyond(original, [name for name in changed if name in names], interval, inputs)
    for name, module in original.named_modules():
        model.get_submodule(name).train(module.training)
    return Changes(model, tuple(changed), left)


def _activation(model: nn.Module, site: Site, interval: tuple[float, float]) -> tuple[str, str]:
    """The name of the module that computes a site's activation, or why there is none to replace."""
    if site.kind not in ("dense", "gated") or site.formula is None or not site.formula.complete:
        return "", f"a layer of kind {site.kind!r} whose activation cannot be taken out"
    bent = "gate" if "gate" in site.reads else "up"
    x = torch.linspace(*interval, 101, dtype=torch.float64)
    wide = x[:, None].expand(-1, site.width)
    roles = {role: wide if role == bent else torch.ones_like(wide) for role in site.reads}
    with torch.no_grad():
        y = site.formula(roles, model.state_dict().__getitem__)
    place, _, last = site.taps[bent].module.rpartition(".")
    parent = model.get_submodule(place)
    children = list(parent._modules)  # named_children() would pass over a module that stands there twice
    if isinstance(parent, nn.Sequential):
        children = children[children.index(last) + 1 :]
    fits = [child for child in children if _computes(parent._modules[child], x, y)]
    if not fits:
        return "", "its activation is no module beside its linear map, or has parameters of its own"
    if len(fits) > 1 and not isinstance(parent, nn.Sequential):
        return "", f"several modules could be its activation: {', '.join(fits)}"
    return f"{place}.{fits[0]}".removeprefix("."), ""


def _computes(module: nn.Module | None, x: Tensor, y: Tensor) -> bool:
    """Whether a module without parameters gives, for x, every column of y."""
    if module is None or any(True for _ in module.parameters()) or any(True for _ in module.children()):
        return False
    try:
        with torch.no_grad():
            own = module(x)
    except (TypeError, ValueError, RuntimeError, IndexError):  # not a function of one tensor of any shape
        return False
    return isinstance(own, Tensor) and own.shape == x.shape and torch.allclose(own[:, None].expand_as(y), y)


def _put_before(model: nn.Module, site: Site, options: dict[str, Any]) -> tuple[str, str]:
    """Make a site's first linear map a GRKAN with its weights that begins as it; or say why it was left."""
    name = site.taps["up"].module
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:
        return name, f"a {type(linear).__name__}, not a plain nn.Linear: no rational stands before it"
    if linear.in_features % options["groups"]:
        return name, f"its {linear.in_features} inputs do not divide into {options['groups']} groups"
    model.set_submodule(name, GRKAN.around(linear, **options))
    return name, ""


def _warn_beyond(model: nn.Module, names: list[str], interval: tuple[float, float], inputs: Any) -> None:
    """Run the model once and warn of each activation that is often outside the interval."""
    beyond: dict[str, list[float]] = {name: [] for name in names}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            x = given[0]
            beyond[name].append(float(((x < interval[0]) | (x > interval[1])).float().mean()))

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        with torch.no_grad(), evaluating(model):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    for name, shares in beyond.items():
        share = sum(shares) / max(len(shares), 1)
        if share > BEYOND:
            warnings.warn(
                f"{name}: {share:.1%} of its inputs lie outside {list(interval)}, where the fit ends; "
                "the replaced model will differ there. Give a wider `interval`, or train on.",
                stacklevel=3,
            )
