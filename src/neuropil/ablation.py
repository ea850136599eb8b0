"""What a vision model loses when a neuron is silent: the `ablation` columns of its atlas.

>>> import torch
>>> from torch import nn
>>> from neuropil.data import Probe
>>> from neuropil.models import load
>>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
>>> images = Probe("noise", torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), ("noise",) * 40)
>>> model = load(net)
>>> sorted(Ablation(model, images).columns(model.sites[0]))
['ablation', 'ablation_estimate', 'ablation_se']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from neuropil._taps import tapped
from neuropil.data.probes import spaced
from neuropil.errors import ModelError
from neuropil.evaluate import scores
from neuropil.neurons import Site
from neuropil.vision import Prepared, as_rows

if TYPE_CHECKING:
    from neuropil.data import Probe
    from neuropil.models import Model

BUDGET = 5e12  # floating-point operations that the ablations of a whole model may take
FEW, MANY = 16, 64  # images on which a neuron is ablated


class Ablation:
    """What the model loses when a neuron is silent: log-probability of the right class, in nats.

    `ablation` is the mean over images of log p(c) - log p(c | the neuron's activation is 0 everywhere), c the image's
    class where the model knows the probe's classes, else the class that the whole model prefers; `ablation_se` its
    standard error. Above 0, the neuron supports that class.

    Silencing costs a forward pass a neuron. So it is bounded: at most 5e12 floating-point operations for all sites
    together (some minutes on one core), spread evenly over them. `ablation_estimate` tells for every neuron what the
    loss would be if it were linear in the activation (minus activation times gradient, one backward pass); where
    not all neurons of a site can be silenced, those with the estimates farthest from 0 are, and `ablation` is empty
    for the others. 64 images are used where they suffice for all neurons, else 16, evenly spaced over the probe.
    """

    def __init__(self, model: Model, images: Probe, budget: float = BUDGET, batch_size: int = 16) -> None:
        self._run = Prepared(model, images, batch_size)
        neurons, sites = sum(s.width for s in model.sites), len(model.sites)
        cost = _flops(self._run)
        count = min(MANY, len(images))
        if cost * count * neurons > budget:
            count = min(FEW, len(images))
        self.chosen = spaced(len(images), count)
        self.most = max(1, int(budget / (cost * count * sites)))
        self.settings = {**images.settings, "budget": budget, "ablated_on": count, "neurons_a_site": self.most}
        self._estimates: dict[str, Tensor] = {}
        self._whole: tuple[Tensor, Tensor] | None = None

    def columns(self, site: Site) -> dict[str, Any]:
        if site.name not in self._estimates:
            self._estimates = self._estimated(self._run.model.sites[site.number :])
        estimate = self._estimates.pop(site.name)
        first = estimate.abs().argsort(descending=True, stable=True)[: self.most].tolist()
        loss, error = self._silenced(site, first)
        return {"ablation": _known(loss), "ablation_se": _known(error), "ablation_estimate": estimate}

    def _targets(self) -> tuple[Tensor, Tensor]:
        """The class of every image, and its log-probability by the whole model."""
        if self._whole is None:
            with torch.inference_mode():
                logs = torch.cat(
                    [logits(self._run.module(x)).log_softmax(1) for _, x in self._run.batches(self.chosen)]
                )
            labels, known = self._run.images.labels, len(self._run.images.classes)
            targets = labels[self.chosen] if labels is not None and known == logs.shape[1] else logs.argmax(1).cpu()
            self._whole = targets, logs.cpu().gather(1, targets.unsqueeze(1))[:, 0]
        return self._whole

    def _estimated(self, sites: list[Site]) -> dict[str, Tensor]:
        """Minus activation times gradient, summed over places, mean over images."""
        targets, _ = self._targets()
        sums = {s.name: torch.zeros(s.width) for s in sites}
        for start, x in self._run.batches(self.chosen):
            for i in range(0, len(x), 4):  # a backward pass keeps all activations
                part = x[i : i + 4]
                for site, rows in self._products(part, targets[start + i : start + i + len(part)], sites):
                    sums[site.name] += rows.sum((0, 2)).cpu()
        return {name: total / len(self.chosen) for name, total in sums.items()}

    def _products(self, x: Tensor, targets: Tensor, sites: list[Site]) -> Iterator[tuple[Site, Tensor]]:
        """Each site's activation times the gradient of the classes' log-probability, images x neurons x places."""
        held: dict[str, Tensor] = {}

        def hold(site: Site) -> Callable[[Tensor], Tensor]:
            def act(h: Tensor) -> Tensor:
                held[site.name] = h
                return h.clone()  # what follows may overwrite its input

            return act

        with torch.enable_grad(), tapped(self._run.module, [(s.tap, s.width, hold(s)) for s in sites]):
            logs = logits(self._run.module(x.requires_grad_())).log_softmax(1)
            own = logs.gather(1, targets.unsqueeze(1).to(logs.device)).sum()
            gradients = torch.autograd.grad(own, list(held.values()), allow_unused=True)
        by_name = dict(zip(held, gradients, strict=True))
        for site in sites:
            if (gradient := by_name.get(site.name)) is not None:
                yield site, as_rows((held[site.name] * gradient).detach(), site.tap.axis, len(x))

    def _silenced(self, site: Site, neurons: list[int]) -> tuple[Tensor, Tensor]:
        targets, before = self._targets()
        loss, error = torch.full((site.width,), torch.nan), torch.full((site.width,), torch.nan)
        index = 0

        def silence(h: Tensor) -> Tensor:
            h = h.clone()
            h.select(site.tap.axis, index).zero_()
            return h

        inputs = list(self._run.batches(self.chosen))
        with torch.inference_mode(), tapped(self._run.module, [(site.tap, site.width, silence)]):
            for index in neurons:
                logs = torch.cat([logits(self._run.module(x)).log_softmax(1).cpu() for _, x in inputs])
                lost = before - logs.gather(1, targets.unsqueeze(1))[:, 0]
                loss[index] = lost.mean()
                error[index] = lost.std() / math.sqrt(len(lost)) if len(lost) > 1 else torch.nan
        return loss, error


def _known(values: Tensor) -> pa.Array:
    """A column that is empty where nothing was measured."""
    return pa.array(values.numpy(), from_pandas=True)


def logits(out: Any) -> Float[Tensor, "n classes"]:
    """The scores of classes in what a model gave. Raises ModelError where it gave none."""
    found = scores(out)
    if found is None:
        raise ModelError("this model gives no scores of classes, so what it loses without a neuron cannot be measured")
    return found


def classifies(model: Model, images: Probe) -> bool:
    """Whether the model gives scores of classes."""
    run = Prepared(model, images, 1)
    try:
        with torch.inference_mode():
            logits(run.module(next(run.batches([0]))[1]))
    except ModelError:
        return False
    return True


def _flops(run: Prepared) -> float:
    """Floating-point operations of one image: those of the products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run.module(next(run.batches([0]))[1])
    return float(max(counter.get_total_flops(), 1))
