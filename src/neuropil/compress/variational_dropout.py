r"""Learn which weights, or which neurons, are only noise, and drop them: the Bayesian pruners to compare others with.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(256, 40); y = x[:, 10:15].sum(1, keepdim=True)
>>> model = nn.Sequential(nn.Linear(40, 1))
>>> dropout = VariationalDropout(model, data_size=256, warmup=100)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.02)  # afterwards: it trains the variances too
>>> for _ in range(500):
...     optimizer.zero_grad()
...     loss = 50 * (model(x) - y).square().mean() + dropout.kl()
...     loss.backward()
...     optimizer.step()
...     dropout.step()
>>> dropout.prune(density=0.125).model[0].weight[0].nonzero().flatten().tolist()
[10, 11, 12, 13, 14]

*Sparse variational dropout* (`group=None`): $w \sim N(\mu, \alpha \mu^2)$ under a log-uniform prior, whose divergence
is approximated by

$$-\mathrm{KL} \approx k_1\, \mathrm{sigmoid}(k_2 + k_3 \ln \alpha) - \tfrac12 \ln(1 + 1/\alpha) - k_1 .$$

*Group* variational dropout (`group="in"` or `"out"`): all weights of a group share a scale, $w = z v$, with the
log-uniform prior (normal-Jeffreys) on $z \sim N(\mu_z, \alpha \mu_z^2)$ and $N(0, 1)$ on $v \sim N(\mu, \sigma^2)$. A
group is one input of a layer with all that reads it (`"in"`, the paper's) or one neuron with all that it reads
(`"out"`). Weights and groups with $\ln \alpha \ge 3$ go.

One sample of the weights serves a batch, as in `TurboVBI`; the papers sample activations.

Source: Molchanov, Ashukha and Vetrov, "Variational Dropout Sparsifies Deep Neural Networks", ICML 2017,
arXiv:1701.05369; groups: Louizos, Ullrich and Welling, "Bayesian Compression for Deep Learning", NeurIPS 2017,
arXiv:1705.08665.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress._noisy import Gaussian, Layer, bake, check_training, drawn, kept, ramp, wrap

K1, K2, K3 = 0.63576, 1.87320, 1.48695  # the papers' fit to the divergence from the log-uniform prior
THRESHOLD = 3.0  # ln alpha from which a weight is noise
TINY = 1e-12


class _Grouped(Gaussian):
    """A Gaussian weight times a Gaussian scale that a group shares."""

    def __init__(self, mean: Tensor, log_variance: float, noise: torch.Generator, dim: int) -> None:
        super().__init__(mean, log_variance, noise)
        shape = [size if d == dim else 1 for d, size in enumerate(mean.shape)]
        self.scale = nn.Parameter(torch.ones(shape, dtype=mean.dtype, device=mean.device))
        self.scale_log_variance = nn.Parameter(torch.full_like(self.scale, log_variance))

    def forward(self, mean: Tensor) -> Tensor:
        if not self.training:
            return self.mean(mean)
        scale = self.scale + drawn(self.scale, self.noise) * (0.5 * self.scale_log_variance).exp()
        return scale * super().forward(mean)

    def mean(self, mean: Tensor) -> Tensor:
        return mean * self.scale


class VariationalDropout:
    """Sparse or group variational dropout over all linear maps and convolutions, stepped like a scheduler.

    Changes `model` in place as `TurboVBI` does: add `kl()` to the mean loss, call `step()` after the optimizer's,
    `prune()` gives a plain copy. `data_size`, `warmup`, `log_variance`, `skip` and `seed` are as there. Raises
    ValueError for settings that make no sense, ModelError where there is nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        data_size: int,
        group: str | None = None,
        warmup: int = 0,
        log_variance: float = -9.0,
        skip: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        check_training(data_size, warmup, log_variance)
        if group not in (None, "in", "out"):
            raise ValueError(f"VariationalDropout(group={group!r}): expected None, 'in' or 'out'")
        self.model, self.data_size, self.warmup, self.group = model, data_size, warmup, group
        self.t = 0
        self._noise = torch.Generator(next(model.parameters()).device).manual_seed(seed)

        def make(weight: Tensor, transposed: bool) -> Gaussian:
            if group is None:
                return Gaussian(weight.detach(), log_variance, self._noise)
            return _Grouped(weight.detach(), log_variance, self._noise, int((group == "in") != transposed))

        self._layers, self.left = wrap(model, skip, make)

    def kl(self) -> Float[Tensor, ""]:
        """What to add to the mean loss of a batch: the divergence from the prior / data_size, times the warm-up."""
        total = torch.stack([self._divergence(layer) for layer in self._layers]).sum()
        return total * (ramp(self.t, self.warmup) / self.data_size)

    def step(self) -> None:
        """Count one optimizer step."""
        self.t += 1

    @property
    def log_alpha(self) -> dict[str, Float[Tensor, "*_"]]:
        """ln alpha of each weight, in the weight's shape, by module name; within a group all are equal."""
        return {layer.name: self._log_alpha(layer).expand_as(layer.original).detach() for layer in self._layers}

    def prune(self, density: float | None = None) -> Changes:
        """A plain copy with means for weights and zeros where ln alpha is 3 or more.

        `density` keeps instead the share of all weights with the lowest ln alpha, exactly.
        """
        scores = {la.name: -la.seen(self.log_alpha[la.name]) for la in self._layers}
        return bake(self.model, self._layers, kept(scores, -THRESHOLD, density), self.left)

    def state_dict(self) -> dict[str, Any]:
        """The step and the noise: all else is the model's."""
        return {"t": self.t, "noise": self._noise.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.t = state["t"]
        self._noise.set_state(state["noise"].cpu())

    def _log_alpha(self, layer: Layer) -> Tensor:
        held = layer.gaussian
        if isinstance(held, _Grouped):
            return held.scale_log_variance - (held.scale.square() + TINY).log()
        return held.log_variance - (layer.original.square() + TINY).log()

    def _divergence(self, layer: Layer) -> Tensor:
        log_alpha = self._log_alpha(layer)
        total = (K1 + 0.5 * nn.functional.softplus(-log_alpha) - K1 * torch.sigmoid(K2 + K3 * log_alpha)).sum()
        held = layer.gaussian
        if isinstance(held, _Grouped):
            log_variance = held.log_variance
            total = total + 0.5 * (layer.original.square() + log_variance.exp() - log_variance - 1).sum()
        return total
