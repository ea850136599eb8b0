"""Does the neuron move the word it is named after? A causal check of every label.

A label read off a neuron's weights is a claim. `CausalCheck` tests it: the neuron is clamped up and down at
the last position of some prompts, and the change of its label's tokens is laid beside that of matched
random tokens.

**What is measured.** Logits are centred, `c_t = logit_t - mean over the vocabulary`, so that a shift of all
logits, which changes no probability, counts nothing. For neuron `n`, prompt `p` and token `t`,

    effect = (c_t[h_n := +v] - c_t[h_n := -v]) / 2,     averaged over the label's tokens, then over prompts;

`effect_up` and `effect_down` are the changes against the unclamped run. `v` (`clamp_value`) is the neuron's
own largest |activation| on the prompts' tokens, their first tokens aside (these carry outliers a hundred
times larger in many models), but at least a tenth of the site's median: the push stays within the range
that the neuron uses. With `clamp="up"` the output of the up-projection is set to +-30 instead, as in the
paper, and a closed gate stays closed.

**Controls.** Each neuron has its own 16 random tokens, matched to its label's by token number and row norm
(`neuropil.interpret.controls`).

**Verdict.** Written before any run. Let d_p = label's effect - mean effect of its controls, on prompt p. A
label is confirmed if both of two hypotheses are rejected, that is, if the larger of two p-values passes the
Benjamini-Hochberg rule at 5% within the site, and if the effect has the sign of d:

1. "over prompts the mean of d is zero": t-test with the variance moderated over the site's neurons, d being
   measured in units of the controls' spread;
2. "the label's token is one more random token": the label's effect lies within the spread of its own
   controls.

The verdict is then "promotes" (effect > 0) or "suppresses" (effect < 0), else "no effect".

**Its error rate is measured, not assumed.** Beside its own label every neuron is given that of another
neuron of its site, drawn at random, with controls matched to it. `shuffled_confirmed` says whether it would
have been confirmed under the same p-value limit. Its mean is the false positive rate; over the mean of
`confirmed` it estimates the false discovery rate. In an atlas:

    SELECT layer, avg(confirmed::INT) AS confirmed, avg(shuffled_confirmed::INT) AS false_positive_rate,
           avg(shuffled_confirmed::INT) / avg(confirmed::INT) AS false_discovery_rate
    FROM neurons GROUP BY layer ORDER BY layer

What the verdict does not say: that the neuron moves this word *only*, or in other contexts than at the end of
such prompts. A neuron deep below the head may matter through many others; its effect on its own label is
then often lost in the spread of its controls, and the verdict is "no effect".

**Cost.** Two rows a neuron and prompt, each through the blocks above its own alone
(`neuropil.interpret.replay`), which takes little more than their bare matrix products. Memory: the model,
`rows` activations of one block, and about `25 * rows` rows of the head. Chunks are fixed by `rows` alone, and
what is computed for few rows runs on one thread, so that a site's values depend neither on what was done before it
nor (replayed) on threads.

Source of the clamping: Davies 2025, "Decoding specialised feature neurons in LLMs with the final projection
layer" (arXiv 2501.02688). The controls, the standard errors and the verdict are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuropil.errors import ModelError, NeuropilError
from neuropil.interpret.controls import MatchedTokens
from neuropil.interpret.replay import WAYS, Replay, choose_way, one_thread, run_to_head
from neuropil.interpret.verdict import beyond_controls, moderated_t, step_up
from neuropil.neurons import Site, capture

if TYPE_CHECKING:
    from neuropil.models import Model

__all__ = ["CausalCheck", "neutral_prompts"]

CONTROLS = 16
MAX_VARIANTS = 8  # label tokens that count; the best scored come first
RATE = 0.05
FLOOR = 0.1  # of the site's median: the least a neuron is pushed
UP_VALUE = 30.0


def neutral_prompts() -> list[str]:
    """The library's own short prompts, on many subjects, each ending where a content word is likely.

    >>> len(neutral_prompts()), neutral_prompts()[0]
    (64, 'On Sunday afternoon the whole family drove to the')
    """
    text = (files("neuropil") / "data" / "prompts.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line.strip()]


class CausalCheck:
    """Clamp every neuron of a site up and down and test its label; see the module's docstring for the rule.

    `prompts` are texts (or lists of token ids); the first `n_prompts` are clamped, all of them measure the
    natural range. `rows` is how many runs share a batch; results do not depend on it beyond rounding.

    Raises ModelError for a model without an output head, NeuropilError for unusable prompts.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
        n_prompts: int = 3,
        clamp: str = "hidden",
        value: float | None = None,
        controls: int = CONTROLS,
        rows: int = 512,
        seed: int = 0,
    ) -> None:
        if clamp not in ("hidden", "up"):
            raise ValueError(f"clamp={clamp!r}: expected 'hidden' (input of the down-projection) or 'up'")
        self.model, self.clamp, self.controls, self.rows, self.seed = model, clamp, controls, rows, seed
        self.value = UP_VALUE if clamp == "up" and value is None else value
        self.prompts: list[Any] = list(neutral_prompts() if prompts is None else prompts)
        self.ids = [self._tokenize(prompt) for prompt in self.prompts]
        self.n_prompts = min(n_prompts, len(self.ids))
        if self.n_prompts < 2:
            raise NeuropilError(f"a standard error needs at least 2 prompts, got {self.n_prompts}")
        head = model.head()
        self._head: Tensor = head.weight
        self._bias: Tensor | None = head.bias
        self._mean_row = head.weight.mean(0)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the columns depend on, beside the model and its labels; fit for JSON."""
        return {
            "prompts": self.prompts,
            "n_prompts": self.n_prompts,
            "clamp": self.clamp,
            "value": "natural" if self.value is None else self.value,
            "controls": self.controls,
            "rows": self.rows,
            "seed": self.seed,
            "rate": RATE,
            "ways": self.ways,
        }

    @cached_property
    def ways(self) -> dict[str, list[int]]:
        """Numbers of the sites that are run by "replay", by "rows" and by "plain".

        Of the sites that lie in blocks of one class, the first, the middle and the last are compared with
        the plain way; all are run by the slowest way that any of them needs.
        """
        alike: dict[str, list[Site]] = {}
        for site in self.model.sites:
            alike.setdefault(self._replays[0].likeness(site), []).append(site)
        found: dict[str, list[int]] = {way: [] for way in WAYS}
        for sites in alike.values():
            tried = {number: sites[number] for number in (0, len(sites) // 2, len(sites) - 1)}
            slowest = max((self._way(site) for site in tried.values()), key=WAYS.index)
            found[slowest] += [site.number for site in sites]
        return {way: sorted(numbers) for way, numbers in found.items() if numbers}

    def _way(self, site: Site) -> str:
        neurons = torch.tensor([0, site.width - 1])
        values = self._natural(site)[neurons] * torch.tensor([1.0, -1.0])
        return choose_way(self._replays[0], site, neurons, values)

    def columns(
        self,
        site: Site,
        decoded: Mapping[str, Sequence[Any]],
        on_step: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """The columns of group "causal" for one site: name -> array with one entry a neuron.

        `decoded` holds `label_token` (one token id a neuron, negative for none) and `label_tokens` (a list
        of ids a neuron, may be empty). `on_step(done, total)` is called after each batch, with rows as the
        unit. A neuron without a label has NaN effects and the verdict "no effect". The answer depends on
        the site alone, not on sites done before.
        """
        labels, counts = self._labels(site, decoded)
        other = self._shuffled(site, labels, counts)
        sets = [(labels, counts, 2 * site.number), (labels[other], counts[other], 2 * site.number + 1)]
        drawn = [self._match.draw(tokens, n, self.controls, self._seed(s)) for tokens, n, s in sets]
        tokens = torch.cat([labels, drawn[0], labels[other], drawn[1]], 1)
        half, up, down, values = self._effects(site, tokens, labels.shape[1], on_step)
        width = labels.shape[1] + self.controls
        own = _Tested(half[:, :width], counts, labels.shape[1])
        null = _Tested(half[:, width:], counts[other], labels.shape[1])
        return self._table(own, null, _label_mean(up, counts), _label_mean(down, counts), values)

    # -- running the model ------------------------------------------------------------------------------

    def _effects(
        self,
        site: Site,
        tokens: Int[Tensor, "width t"],
        n_labels: int,
        on_step: Callable[[int, int], None] | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Changes of centred logits: half the difference between up and down, [width, t, prompts]; for labels
        alone also up and down, [width, labels, prompts]; and the values the neurons were set to."""
        way = next(way for way, numbers in self.ways.items() if site.number in numbers)
        pushes = [self._pushes(replay, site) for replay in self._replays]
        chunk = max(self.rows // 2, 1)
        halves, ups, downs = [], [], []
        for start in range(0, site.width, chunk):
            neurons = torch.arange(start, min(start + chunk, site.width))
            moved = []
            for replay, push in zip(self._replays, pushes, strict=True):
                final = replay.run(site, neurons.repeat(2), push[:, neurons].flatten(), way)
                moved.append((final - replay.clean).unflatten(0, (2, -1)))
                if on_step is not None:
                    done = start * len(pushes) + len(moved) * len(neurons)
                    on_step(2 * done, 2 * site.width * len(pushes))
            up, down = torch.stack(moved, -1).unbind(0)  # each [chunk, d, prompts]
            rows = self._head[tokens[neurons]]
            halves.append(self._centred(rows, (up - down) / 2))
            ups.append(self._centred(rows[:, :n_labels], up))
            downs.append(self._centred(rows[:, :n_labels], down))
        values = torch.stack([push.abs().amax(0) for push in pushes]).amax(0)
        arrays = [torch.cat(parts).numpy() for parts in (halves, ups, downs)]
        return arrays[0], arrays[1], arrays[2], values.numpy()

    def _centred(self, rows: Tensor, moved: Tensor) -> Float[Tensor, "n t prompts"]:
        """Change of the centred logits of the tokens with these head rows; biases and clean logits cancel."""
        return torch.bmm(rows, moved) - torch.einsum("d,ndp->np", self._mean_row, moved)[:, None, :]

    def _pushes(self, replay: Replay, site: Site) -> Float[Tensor, "2 width"]:
        """What each activation is set to on this prompt, up and down."""
        if self.clamp == "up":
            assert self.value is not None
            return torch.stack([replay.all_up(site, self.value), replay.all_up(site, -self.value)])
        v = self._natural(site)
        return torch.stack([v, -v])

    def _natural(self, site: Site) -> Float[Tensor, " width"]:
        if self.value is not None:
            return torch.full((site.width,), float(self.value))
        largest = self._ranges[site.name]
        return largest.clamp(min=max(FLOOR * largest.median().item(), 1e-6))

    @cached_property
    def _replays(self) -> list[Replay]:
        module = self.model.module()
        return [Replay(module, self.model.sites, ids) for ids in self.ids[: self.n_prompts]]

    @cached_property
    def _ranges(self) -> dict[str, Tensor]:
        """Largest |activation| of every neuron over the prompts' tokens, the first of each prompt aside."""
        module, sites = self.model.module(), self.model.sites
        largest = {site.name: torch.zeros(site.width) for site in sites}
        for length in sorted({len(ids) for ids in self.ids}):
            batch = torch.tensor([ids for ids in self.ids if len(ids) == length])
            with one_thread(), torch.inference_mode(), capture(module, sites) as seen:
                run_to_head(module, input_ids=batch)
            for site in sites:
                if site.name in seen:
                    h = seen[site.name].reshape(-1, site.width).abs()
                    if site.kind != "expert":  # an expert sees some of the tokens; which, is not known here
                        h = h.reshape(len(batch), length, site.width)[:, 1:].flatten(0, 1)
                    if len(h):
                        largest[site.name] = torch.maximum(largest[site.name], h.amax(0).float())
        return largest

    def _tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.model.tokenizer is None:
                raise ModelError("this model has no tokenizer: give the prompts as lists of token ids")
            ids = list(self.model.tokenizer(prompt)["input_ids"])
        else:
            ids = [int(i) for i in prompt]
        if len(ids) < 2:
            raise NeuropilError(f"prompt {prompt!r} has {len(ids)} tokens; the causal check needs at least 2")
        return ids

    # -- labels and their controls ----------------------------------------------------------------------

    def _labels(self, site: Site, decoded: Mapping[str, Sequence[Any]]) -> tuple[Tensor, Tensor]:
        """Label tokens padded with 0, [width, most], and how many each neuron has (0: no label)."""
        first, lists = _listed(decoded["label_token"]), _listed(decoded["label_tokens"])
        if len(first) != site.width or len(lists) != site.width:
            raise ValueError(f"site {site.name} has {site.width} neurons, labels of {len(first)} were given")
        own = [
            [int(t) for t in (many or ([one] if one is not None and one >= 0 else []))][:MAX_VARIANTS]
            for one, many in zip(first, lists, strict=True)
        ]
        labels = torch.zeros(site.width, max(1, *map(len, own)), dtype=torch.long)
        for row, tokens in enumerate(own):
            labels[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        return labels, torch.tensor([len(tokens) for tokens in own])

    def _shuffled(self, site: Site, labels: Tensor, counts: Tensor) -> Int[Tensor, " width"]:
        """For each neuron another one of its site, drawn at random, labelled by another word if possible."""
        generator = torch.Generator().manual_seed(self._seed(-1 - site.number))
        labelled = counts.nonzero().flatten()
        other = torch.arange(site.width)
        if len(labelled) == 0:
            return other
        word = self._match.word[labels[:, 0]]
        same = torch.ones(site.width, dtype=torch.bool)
        for _ in range(16):
            drawn = labelled[torch.randint(len(labelled), (site.width,), generator=generator)]
            other = torch.where(same, drawn, other)
            same = word[other] == word
        return other

    @cached_property
    def _match(self) -> MatchedTokens:
        texts = self.model.tokens() if self.model.tokenizer is not None else None
        return MatchedTokens(self._head.norm(dim=1), texts)

    def _seed(self, stream: int) -> int:
        return int(np.random.SeedSequence([self.seed, stream + 2**31]).generate_state(1)[0])

    # -- verdict ----------------------------------------------------------------------------------------

    def _table(
        self, own: _Tested, null: _Tested, up: np.ndarray, down: np.ndarray, values: np.ndarray
    ) -> dict[str, Any]:
        limit = step_up(own.p, RATE)
        confirmed = own.passes(limit)
        sign = np.where(own.mean > 0, "promotes", "suppresses")
        f32 = {
            "effect": own.mean,
            "effect_se": own.se,
            "control": own.control,
            "control_se": own.control_se,
            "control_spread": own.spread,
            "effect_up": up.mean(1),
            "effect_down": down.mean(1),
            "clamp_value": values,
            "p_value": own.p,
            "shuffled_effect": null.mean,
        }
        return {name: np.asarray(column, dtype=np.float32) for name, column in f32.items()} | {
            "shuffled_confirmed": null.passes(limit),
            "prompts": np.full(len(confirmed), self.n_prompts, dtype=np.int32),
            "verdict": np.where(confirmed, sign, "no effect").tolist(),
            "confirmed": confirmed,
        }


class _Tested:
    """Effects of one set of labels and of their controls, `[width, labels + controls, prompts]`, tested."""

    def __init__(self, half: np.ndarray, counts: Tensor, n_labels: int) -> None:
        half = half.astype(np.float64)
        label, controls = _label_mean(half[:, :n_labels], counts), half[:, n_labels:]
        prompts = label.shape[1]
        self.mean = label.mean(1)
        self.se = label.std(1, ddof=1) / np.sqrt(prompts)
        between = controls.mean(1)
        self.control = between.mean(1)
        self.control_se = between.std(1, ddof=1) / np.sqrt(prompts)
        p_token, self.spread = beyond_controls(self.mean, controls.mean(2))
        self.p = np.full(len(label), np.nan)
        ok = np.isfinite(self.mean) & (self.spread > 0)
        difference = label - between
        p_prompt, _ = moderated_t(difference[ok] / self.spread[ok, None])
        self.p[ok] = np.maximum(p_prompt, p_token[ok])
        self._sign = np.sign(self.mean) == np.sign(difference.mean(1))

    def passes(self, limit: float) -> np.ndarray:
        return (self.p <= limit) & self._sign


def _label_mean(x: np.ndarray, counts: Tensor) -> np.ndarray:
    """Mean over the first `counts` labels, [width, labels, prompts] -> [width, prompts]; NaN for none."""
    n = counts.numpy()[:, None]
    keep = (np.arange(x.shape[1])[None, :] < n)[..., None]
    with np.errstate(invalid="ignore"):
        return (x * keep).sum(1) / np.where(n > 0, n, np.nan)


def _listed(column: Any) -> list[Any]:
    """A column as Python values, whether it is an Arrow array, a numpy array, a tensor or a list."""
    for name in ("to_pylist", "tolist"):
        if hasattr(column, name):
            return getattr(column, name)()
    return list(column)
