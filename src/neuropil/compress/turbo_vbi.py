r"""Prune while training, so that the weights that are left lie in runs and whole neurons vanish.

Weights become Gaussian distributions under a three-layer prior whose on/off pattern follows Markov chains. A weight
stays where the data and its neighbours speak for it, so the sparse matrices are regular: few blocks, short indices,
empty rows.

>>> import torch
>>> from torch import nn
>>> from neuropil.compress import HMMPrior, regularity
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(256, 40); y = x[:, 10:15].sum(1, keepdim=True)
>>> model = nn.Sequential(nn.Linear(40, 1))
>>> vbi = TurboVBI(model, HMMPrior.of(density=0.2, run=5.0), data_size=256, every=10, warmup=100, b=0.3, b_bar=1e-3)
>>> optimizer = torch.optim.Adam(model.parameters(), lr=0.02)  # after TurboVBI: it trains the variances too
>>> for _ in range(400):
...     optimizer.zero_grad()
...     loss = 50 * (model(x) - y).square().mean() + vbi.kl()  # mean of -log p(y | x), noise of variance 0.01
...     loss.backward()
...     optimizer.step()
...     vbi.step()
>>> pruned = vbi.prune().model
>>> pruned[0].weight[0].nonzero().flatten().tolist()
[10, 11, 12, 13, 14]
>>> regularity(pruned).run  # mean length of a run of weights
5.0

**Prior.** $w_n \mid \rho_n \sim N(0, 1/\rho_n)$; $\rho_n \mid s_n{=}1 \sim \mathrm{Gamma}(a, b)$ and
$\rho_n \mid s_n{=}0 \sim \mathrm{Gamma}(\bar a, \bar b)$ with $\bar a / \bar b \gg a / b$ (rates); $s \sim p(s)$, any
of `neuropil.compress.support`: `HMMPrior`, `BernoulliPrior` (plain sparsity), `GroupPrior`, or your own.

**Posterior.** $q(w) = \prod N(\mu_n, \sigma_n^2)$ is trained by your optimizer: the model samples
$w = \mu + \sigma \epsilon$ in training, and `kl()` is the rest of the bound for one example,
$\frac{1}{N} \sum_n \frac12 (\hat\rho_n (\sigma_n^2 + \mu_n^2) - 1 - \ln \hat\rho_n \sigma_n^2)$ with
$\hat\rho = E_q[\rho]$. Every `every` steps `step` runs the turbo iteration, closed forms and linear in the weights:

* Module A: from $E[w_n^2] = \mu_n^2 + \sigma_n^2$ and the prior messages $\pi$, the posterior of $\rho$ and $s$ and
  the evidence $e_n$ (posterior less prior log-odds).
* Module B: the sum-product messages of $p(s)$ given $e$ become the new $\pi$, damped.

Begin from a trained network. Weights with $q(s_n{=}1) < \frac12$ go; train the rest on for a little (fine-tune) if you
prune to another density than the posterior's own. The optimizer must have no weight decay: the prior is one. Variances
(the parameters that end in `log_variance`) want a rate some ten times that of the means. With few data for many weights
the prior outweighs them: a `data_size` some times too large (a cold posterior) keeps accuracy.

Chosen where the paper leaves something open (of the paper itself only the abstract could be read; the equations are
those of the model that it names, for real weights, so that the updates add 1/2 and $w^2/2$, not 1 and $|w|^2$):

* `posterior="joint"`, the default, keeps $q(\rho, s)$ as one factor: the evidence is the ratio of two Student's t
  densities. It is the tighter bound. The factorised $q(\rho) q(s)$ of the Turbo-VBI literature
  (`posterior="factorised"`) has traps: with $a = b = \bar a = 1$ and small $\bar b$ every weight locks to "there".
* `b` and `b_bar` left out are $a\,m$ and $\bar a\,(0.03)^2 m$ of each layer, $m$ its mean squared weight at the start.
* Messages of module B begin with the end of the warm-up of the prior's weight (an S-shaped ramp), and move by `rate`
  of the way in log-odds.
* Chains run along what a neuron reads; for convolutions along the flattened filter (or each kernel), see `HMMPrior`.
* One sample of the weights serves a whole batch.

Source: Xia, Tsang and Lau, "Structured Bayesian Compression for Deep Neural Networks Based on The Turbo-VBI Approach",
IEEE Transactions on Signal Processing 71, 2023, arXiv:2302.10483. The Turbo-VBI algorithm: Liu, Liu and Lau, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress._dead import without_dead_neurons
from neuropil.compress._layered import (
    Gammas,
    factorised_evidence,
    gamma_posterior,
    joint_evidence,
    joint_precision,
)
from neuropil.compress._noisy import Gaussian, Layer, bake, check_training, kept, ramp, wrap
from neuropil.compress.structured import Example
from neuropil.compress.support import CLIP, Prior
from neuropil.errors import ModelError

SPIKE = 0.03  # of the typical size of a weight: that of one which is not there
ITERATIONS = 5  # of q(rho), q(s) and module B within one factorised update


class TurboVBI:
    """Bayesian pruning during training, stepped like a learning-rate scheduler.

    Changes `model` in place: the weight of every linear map and convolution becomes a distribution by
    `torch.nn.utils.parametrize`, with the log-variances as new parameters (so make the optimizer afterwards). `prune`
    gives a plain copy. Modules that are left as they were are in `left`, with the reason.

    Parameters
    ----------
    prior: of the support; see `neuropil.compress.support`.
    data_size: number of training examples; the loss must be a mean over examples of -log p(y | x).
    a, b, a_bar, b_bar: shapes and rates of the two Gamma priors; rates left out are scaled to each layer.
    every: optimizer steps between updates; a few an epoch.
    warmup: optimizer steps in which the weight of `kl` rises to 1.
    alone: optimizer steps before module B begins to send messages; as long as `warmup` by default. Begun too early,
        while most weights are still there, a chain can keep all of them.
    rate: share of the way, in log-odds, that messages move at an update.
    posterior: "joint" or "factorised" q of precisions and support.
    learn: fit the prior's parameters to each layer by expectation-maximisation, a step at each update.
    log_variance: of the weights at the start.
    skip: names or patterns of modules to leave.
    seed: of the noise; the global generator is not touched.

    Raises ValueError for settings that make no sense, for NaN weights, packed models and layers of zeros;
    ModelError where there is nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        prior: Prior,
        *,
        data_size: int,
        a: float = 1.0,
        b: float | None = None,
        a_bar: float = 1.0,
        b_bar: float | None = None,
        every: int = 100,
        warmup: int = 0,
        alone: int | None = None,
        rate: float = 0.3,
        posterior: str = "joint",
        learn: bool = False,
        log_variance: float = -9.0,
        skip: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        check_training(data_size, warmup, log_variance)
        _check(prior, every, rate, posterior, learn)
        self.model, self.data_size, self.every, self.warmup = model, data_size, every, warmup
        self.rate, self.posterior, self.learn = rate, posterior, learn
        self.alone = warmup if alone is None else alone
        self.t = 0  # optimizer steps done
        scales = _Scales(a, b, a_bar, b_bar)
        self._noise = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        self._start = log_variance
        checked: list[Gammas] = []

        def make(weight: Tensor, transposed: bool) -> Gaussian:
            checked.append(scales.of(weight))
            return Gaussian(weight.detach(), log_variance, self._noise)

        self._layers, self.left = wrap(model, skip, make)
        self._gammas = {layer.name: gammas for layer, gammas in zip(self._layers, checked, strict=True)}
        self.priors: dict[str, Prior] = {layer.name: prior for layer in self._layers}
        self._prior = {layer.name: prior.messages(torch.zeros_like(self._square(layer))) for layer in self._layers}
        self._odds: dict[str, Tensor] = {}
        self._precision: dict[str, Tensor] = {}
        for layer in self._layers:
            self._odds[layer.name] = self._prior[layer.name].clone()
            self._update(layer)

    # --- the schedule ----------------------------------------------------------------------------

    def kl(self) -> Float[Tensor, ""]:
        """What to add to the mean loss of a batch: KL(q(w) || N(0, 1/E[rho])) / data_size, times the warm-up."""
        total = torch.zeros((), device=self._layers[0].original.device)
        for layer in self._layers:
            precision = self._precision[layer.name]
            log_variance = layer.gaussian.log_variance
            square = layer.original.square() + log_variance.exp()
            total = total + 0.5 * (precision * square - log_variance - precision.log() - 1).sum()
        return total * (ramp(self.t, self.warmup) / self.data_size)

    def step(self) -> None:
        """Count one optimizer step; where an update is due, make it."""
        self.t += 1
        if self.t % self.every == 0:
            self._check_trained()
            self.update()

    def update(self) -> None:
        """The turbo iteration: precisions and support from the weights as they are, messages from the support."""
        for layer in self._layers:
            self._update(layer)

    @property
    def support(self) -> dict[str, Float[Tensor, "*_"]]:
        """q(s = 1) of each weight, in the weight's shape, by module name."""
        return {layer.name: layer.seen(self._odds[layer.name].sigmoid()) for layer in self._layers}

    @property
    def odds(self) -> dict[str, Float[Tensor, "*_"]]:
        """The posterior log-odds of each weight, in the weight's shape, by module name."""
        return {layer.name: layer.seen(self._odds[layer.name]) for layer in self._layers}

    @property
    def density(self) -> float:
        """The share of weights that `prune()` would keep now."""
        odds = self._odds.values()
        return sum(int((o > 0).sum()) for o in odds) / sum(o.numel() for o in odds)

    # --- ending ----------------------------------------------------------------------------------

    def prune(self, density: float | None = None, example: Example | None = None) -> Changes:
        """A plain copy of the model with means for weights, and zeros where the posterior says "not there".

        `density` keeps instead the share of all weights with the highest posterior odds, exactly. With an `example`
        input, neurons that read nothing or that nobody reads are taken out (really smaller matrices, the same
        outputs); those that cannot be are named in `left`. For the bytes see `pack_sparse`, for the pattern
        `regularity`.

        Raises ValueError for a density outside (0, 1]. Warns of layers that have lost all their weights.
        """
        masks = kept(self._odds, 0.0, density)
        changes = bake(self.model, self._layers, masks, self.left)
        return changes if example is None else without_dead_neurons(changes, example)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: plain values and tensors (means and variances are the model's)."""
        state: dict[str, Any] = {"t": self.t, "noise": self._noise.get_state()}
        for name, table in (("prior", self._prior), ("odds", self._odds), ("precision", self._precision)):
            state[name] = {layer: value.clone() for layer, value in table.items()}
        state["gammas"] = {name: asdict(gammas) for name, gammas in self._gammas.items()}  # scaled to the first weights
        if self.learn:
            state["learned"] = {name: asdict(prior) for name, prior in self.priors.items()}  # type: ignore[call-overload]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a schedule over the same weights. Raises ValueError for one over others."""
        mine = {name: tuple(value.shape) for name, value in self._odds.items()}
        given = {name: tuple(value.shape) for name, value in state["odds"].items()}
        if mine != given or self.learn != ("learned" in state):
            odd = sorted(n for n in mine | given if mine.get(n) != given.get(n)) or ["the setting `learn`"]
            raise ValueError(f"the state is of another training: {', '.join(odd)} differ; use the same model")
        self.t = state["t"]
        self._noise.set_state(state["noise"].cpu())
        for name, table in (("prior", self._prior), ("odds", self._odds), ("precision", self._precision)):
            for layer, value in table.items():
                table[layer] = state[name][layer].to(value.device, copy=True)
        self._gammas = {layer: Gammas(**rates) for layer, rates in state["gammas"].items()}
        for layer, settings in state.get("learned", {}).items():
            self.priors[layer] = type(self.priors[layer])(**settings)

    # --- inside ----------------------------------------------------------------------------------

    def _square(self, layer: Layer) -> Tensor:
        """E[w^2], neurons first."""
        variance = layer.gaussian.log_variance.detach().double().exp()
        return layer.seen(layer.original.detach().double().square() + variance)

    def _update(self, layer: Layer) -> None:
        name, square = layer.name, self._square(layer)
        if not bool(torch.isfinite(square).all()):
            raise ModelError(f"{name} holds weights that are NaN or infinite; lower the learning rate")
        gammas = self._gammas[name]
        if self.posterior == "joint":
            evidence = joint_evidence(square, gammas)
            self._listen(name, evidence)
            self._odds[name] = evidence + self._prior[name]
            precision = joint_precision(square, self._odds[name].sigmoid(), gammas)
        else:
            for _ in range(ITERATIONS):
                shape, rate = gamma_posterior(square, self._odds[name].sigmoid(), gammas)
                evidence = factorised_evidence(shape, rate, gammas)
                self._listen(name, evidence)
                self._odds[name] = evidence + self._prior[name]
            shape, rate = gamma_posterior(square, self._odds[name].sigmoid(), gammas)
            precision = shape / rate
        self._precision[name] = layer.seen(precision).to(layer.original.dtype)

    def _listen(self, name: str, evidence: Tensor) -> None:
        """Module B: move the messages towards what the prior makes of the evidence."""
        if self.t == 0 or self.t < self.alone:
            return
        if self.learn:
            self.priors[name] = self.priors[name].learned(evidence)  # type: ignore[attr-defined]
        target = self.priors[name].messages(evidence)
        self._prior[name] = torch.lerp(self._prior[name], target.clamp(-CLIP, CLIP), self.rate)

    def _check_trained(self) -> None:
        if self.t == self.every and all(bool((la.gaussian.log_variance == self._start).all()) for la in self._layers):
            raise ModelError("no variance has moved: make the optimizer after TurboVBI, from model.parameters()")


# ---------------------------------------------------------------------------------------------------- settings


class _Scales:
    """The Gamma priors of a layer, from the settings and the size of its weights."""

    def __init__(self, a: float, b: float | None, a_bar: float, b_bar: float | None) -> None:
        for name, value in (("a", a), ("b", b), ("a_bar", a_bar), ("b_bar", b_bar)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"TurboVBI({name}={value}): shapes and rates are positive numbers")
        self.a, self.b, self.a_bar, self.b_bar = a, b, a_bar, b_bar

    def of(self, weight: Tensor) -> Gammas:
        typical = float(weight.detach().double().square().mean())
        if typical == 0 and (self.b is None or self.b_bar is None):
            raise ValueError("a layer of zeros has no scale for the prior; give b and b_bar, or name it in skip")
        b = self.a * typical if self.b is None else self.b
        b_bar = self.a_bar * SPIKE**2 * typical if self.b_bar is None else self.b_bar
        if self.a_bar / b_bar <= self.a / b:
            raise ValueError(
                f"a_bar / b_bar = {self.a_bar / b_bar:g} must exceed a / b = {self.a / b:g} (by far): the precision of "
                "a weight that is not there is the higher one"
            )
        return Gammas(float(self.a), float(b), float(self.a_bar), float(b_bar))


def _check(prior: Prior, every: int, rate: float, posterior: str, learn: bool) -> None:
    if every < 1:
        raise ValueError(f"TurboVBI(every={every}): expected the steps between updates, 1 or more")
    if not 0 < rate <= 1:
        raise ValueError(f"TurboVBI(rate={rate}): expected a share of the way, in (0, 1]")
    if posterior not in ("joint", "factorised"):
        raise ValueError(f"TurboVBI(posterior={posterior!r}): expected 'joint' or 'factorised'")
    if learn and not hasattr(prior, "learned"):
        raise ValueError(f"TurboVBI(learn=True): {type(prior).__name__} has no method `learned(evidence)`")
