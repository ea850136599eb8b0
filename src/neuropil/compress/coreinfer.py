r"""Generate faster by computing, for a whole answer, only the MLP neurons that the prompt used most.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> _ = torch.manual_seed(0)
>>> config = LlamaConfig(hidden_size=32, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
...                      vocab_size=100, bos_token_id=None, eos_token_id=None)
>>> model, prompt = LlamaForCausalLM(config).eval(), torch.arange(20)[None]
>>> with CoreInfer(model, keep=0.4, layers=slice(1, 4)) as core:
...     answer = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
>>> answer.shape, {name: len(neurons) for name, neurons in core.cores.items()}
(torch.Size([1, 28]), {'model.layers.1.mlp': 32, 'model.layers.2.mlp': 32, 'model.layers.3.mlp': 32})

No other network predicts anything, and nothing is switched from token to token. With $h_i(x)$ the activation of
neuron $i$ (what the down-projection reads: $\mathrm{relu}(W_1 x + b_1)$, or $\mathrm{silu}(W_g x) \cdot W_u x$):

1. *Token-wise core neurons* $C_\alpha(x)$: of the neurons with a positive score, the top ones; how many is
   $\alpha$ times the mean number of positive scores a token of the prompt.
2. *Sentence-wise core neurons* $S_\beta$: the $\lfloor \beta F \rfloor$ of a layer's $F$ neurons that are most often
   token-wise core over the prompt (fewer, where fewer ever were; `keep=1` keeps all).
3. *Stability-guided* (`mode="stability"`, for long prompts): the prompt is read by the dense model, $S_\beta$ is taken
   from that pass and stays for the answer. *Similarity-guided* (`mode="similarity"`, for short ones): the prompt's own
   core neurons in one deep layer choose the most similar cluster of texts seen before (`CoreClusters`), whose core
   neurons are used in every layer.
4. Decoding computes with small matrices, gathered once a prompt: $W[S]$, $b[S]$ and $W_{down}[:, S]$. Attention, its
   cache, the head and all layers outside `layers` are the model's own.

A pass with an empty cache is a prompt and dense, every pass with a filled cache is sparse; so a text that is scored
in one pass shows no difference at all. `core_neurons` gives the sets of a text, `restrict` a smaller copy of the
model that has only those neurons (for models without a cache too), `only` the same for the length of a `with`.

Chosen where the paper leaves something open, or differently:

* `score="abs"` ranks by $|h_i|$, which is the same as the authors' rule for ReLU (all scores are positive there). For
  gated SiLU, half of the large activations are negative and a rule by sign drops them, which costs
  clearly more likelihood (the reproduction has both). `score="signed"` is the authors' rule.
* Neurons with a score of zero or less are never core, as the paper defines it (its code fills up with them). Equal
  frequencies are ordered by the sum of the scores, then by index, so that no result hangs on the order of neurons.
* The layers are those of the code, 6 to 26 of 32, scaled to the model's depth.
* Batches: one set for all rows, by frequency over all their tokens, or the union of the rows' sets. Padding
  is left out by the (two-dimensional) attention mask.
* `refresh_every=n`, not in the paper: every n tokens the sets are chosen anew from the tokens decoded since, all
  earlier ones counting half, so that a long answer may change its subject.
* The code's mode for small GPUs, which leaves the whole matrices in the main memory, is not offered.

Source: Wang, Vahidian, Ye, Gu, Zhang and Chen, "CoreInfer: Accelerating Large Language Model Inference with
Semantics-Inspired Adaptive Sparse Activation", 2024, arXiv:2410.18311.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from neuropil.changes import Changes
from neuropil.compress._coreinfer_slots import Cores, Layers, Narrowing, exclusive, find_slots
from neuropil.compress._coreinfer_usage import SCORES, Usage, share_of
from neuropil.compress.core_clusters import CoreClusters, Inputs, observe, row_mask
from neuropil.errors import ModelError
from neuropil.neurons import activation, find_sites
from neuropil.slots import Slot, named_tensor

MODES, BATCHES = ("stability", "similarity"), ("frequency", "union")


def core_neurons(
    model: nn.Module,
    inputs: Inputs,
    *,
    keep: float = 0.4,
    alpha: float = 0.2,
    score: str = "abs",
    layers: Layers = None,
    tokenizer: Any = None,
) -> dict[str, Int[Tensor, " kept"]]:
    """The sentence-wise core neurons of a text, ascending, by site name; one set for all rows of a batch.

    `inputs` is a text (with its `tokenizer`), what the model takes as its one argument, or a mapping of arguments.
    Raises ValueError for settings out of range and an empty text, ModelError where no layer can leave neurons out.
    """
    slots, _ = find_slots(model, layers)
    _check(slots, keep, alpha, score)
    usages = observe(model, slots, inputs, alpha=alpha, score=score, tokenizer=tokenizer)
    return {name: usage.core(keep) for name, usage in usages.items()}


def restrict(model: nn.Module, cores: Cores) -> Changes:
    """A copy that has only these neurons of the named sites, in really smaller matrices; the rest is as it was.

    Raises KeyError for an unknown site and ValueError for no neuron, one that is not there, or one named twice.
    """
    slots, left = _slots_of(model, cores)
    made = copy.deepcopy(model)
    Narrowing(find_slots(made, [slot.site.number for slot in slots])[0]).narrow(cores)
    weights = [w for s in slots for w in (*s.site.reads.values(), s.site.write) if w is not None]
    return Changes(made, tuple(dict.fromkeys(w.name.rpartition(".")[0] for w in weights)), left)


@contextmanager
def only(model: nn.Module, cores: Cores) -> Iterator[nn.Module]:
    """Within the block every pass computes only these neurons of the named sites; see `restrict`."""
    narrowing = Narrowing(_slots_of(model, cores)[0])
    with exclusive(model):
        narrowing.narrow(cores)
        try:
            yield model
        finally:
            narrowing.widen()


def _slots_of(model: nn.Module, cores: Cores) -> tuple[list[Slot], dict[str, str]]:
    sites = {site.name: site for site in find_sites(model)}
    for name, kept in cores.items():
        if name not in sites:
            raise KeyError(f"no site is called {name!r}; there are {', '.join(list(sites)[:5])} …")
        width, numbers = sites[name].width, set(kept.tolist())
        if not numbers or len(numbers) < len(kept) or min(numbers) < 0 or max(numbers) >= width:
            raise ValueError(f"site {name!r}: expected some of the neurons 0 to {width - 1}, each once")
    slots, left = find_slots(model, [sites[name].number for name in cores])
    if len(slots) < len(cores):
        raise ModelError(f"not all of these sites can leave neurons out: {left}")
    return slots, left


def _check(slots: list[Slot], keep: float, alpha: float, score: str) -> None:
    for name, value in (("keep", keep), ("alpha", alpha)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value}: expected a share in (0, 1]")
    if score not in SCORES:
        raise ValueError(f"score={score!r}: expected one of {SCORES}")
    if share_of(keep, narrowest := min(slot.site.width for slot in slots)) < 1:
        raise ValueError(f"keep={keep} keeps none of the {narrowest} neurons of a layer; raise it")


class CoreInfer:
    """Within its block a causal language model decodes with the prompt's core neurons only.

    Works with `generate()` and with hand-written loops that pass `past_key_values`; every new prompt gets its own
    sets; on leaving, the model has its own parameters again, also after an exception.

    model: any transformers causal LM whose MLPs are plain linear maps; in fp32, bf16, on any device.
    keep: share of each sparse layer's neurons that is computed (beta).
    alpha: share of a token's positive scores that makes its core neurons.
    layers: which layers are sparse, a slice or numbers; by default 6 to 26 of 32, scaled to the model's depth.
    mode: "stability" or "similarity"; the latter needs `clusters`, fitted on the same model.
    score: "abs" or "signed"; see the module.
    batch: "frequency" or "union"; see the module.
    refresh_every: choose the sets anew after so many decoded tokens; 0 never does. Stability mode only.

    After a prompt `cores` has the sets by site name (none while dense), `left` says of each module with a
    matrix that stays whole why. Raises ValueError for settings out of range and for an empty prompt, ModelError for
    a model without a cache or without a layer that can leave neurons out. A prompt of one token says too little of
    what follows: in stability mode it warns, and the answer is dense.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.4,
        *,
        alpha: float = 0.2,
        layers: Layers = None,
        mode: str = "stability",
        score: str = "abs",
        batch: str = "frequency",
        refresh_every: int = 0,
        clusters: CoreClusters | None = None,
    ) -> None:
        slots, self.left = find_slots(model, layers)
        _check(slots, keep, alpha, score)
        if mode not in MODES or batch not in BATCHES:
            raise ValueError(f"mode={mode!r}, batch={batch!r}: expected one of {MODES} and one of {BATCHES}")
        if (mode == "similarity") != (clusters is not None):
            raise ValueError(
                f"mode={mode!r}: give clusters=CoreClusters.fit(model, texts) in similarity mode, only there"
            )
        if refresh_every < 0 or (refresh_every and mode == "similarity"):
            raise ValueError(f"refresh_every={refresh_every}: expected 0 or more tokens, and 0 in similarity mode")
        self._arguments = list(inspect.signature(model.forward).parameters)
        if "past_key_values" not in self._arguments:
            raise ModelError(f"{type(model).__name__} keeps no cache; use core_neurons with restrict or only")
        if clusters is not None and (lost := {slot.site.name for slot in slots} - set(clusters.rankings)):
            raise ValueError(f"the clusters know nothing of {sorted(lost)}: fit them with the same layers")
        self.model, self.keep, self.alpha, self.score, self.batch = model, keep, alpha, score, batch
        self.refresh_every, self.clusters = refresh_every, clusters
        self.cores: dict[str, Int[Tensor, " kept"]] = {}
        self._slots, self._narrowing = slots, Narrowing(slots)
        self._watched = slots if clusters is None else clusters.probes(model)
        self._usages: dict[str, list[Usage]] = {}
        self._seen: dict[str, dict[str, list[Tensor]]] = {}  # site -> role -> what it read since the last refresh
        self._watch, self._hooks = ExitStack(), ExitStack()
        self._prompts = self._steps = 0

    def __enter__(self) -> CoreInfer:
        self._hooks.enter_context(exclusive(self.model))
        self._prompts = self._steps = 0
        for hook in (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ):
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._watch.close()
        self._hooks.close()
        self._narrowing.widen()
        self._seen.clear()
        if kind is None and self._prompts and not self._steps:
            warnings.warn("no pass used a cache, so every pass was a prompt and dense", stacklevel=2)

    # --- the passes --------------------------------------------------------------------------------

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        place = self._arguments.index(name) if name in self._arguments else len(args)
        return args[place] if place < len(args) else kwargs.get(name)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._watch.close()  # of a pass that ended in an exception
        cache = self._argument("past_key_values", args, kwargs)
        if cache is None or int(cache.get_seq_length()) == 0:
            given = self._argument("input_ids", args, kwargs)
            given = self._argument("inputs_embeds", args, kwargs) if given is None else given
            self._read_prompt(given, self._argument("attention_mask", args, kwargs))
            return
        self._steps += 1
        if not self._prompts and self._steps == 1:
            warnings.warn(
                "the cache was filled before the block, so the prompt is not known and the answer is dense; "
                "read the prompt inside",
                stacklevel=4,
            )
        if self.refresh_every and self.cores:
            if self._decoded() >= self.refresh_every:
                self._refresh()
            self._watch_inputs()

    def _after(self, *_: Any) -> None:
        self._watch.close()
        if not self.cores and self._usages:
            self._choose()

    def _read_prompt(self, given: Any, mask: Any) -> None:
        """Go dense, and count over this pass."""
        self._narrowing.widen()
        self._prompts += 1
        self._seen.clear()
        self.cores, self._usages = {}, {}
        if not isinstance(given, Tensor) or given.dim() < 2 or given.shape[1] == 0:
            raise ValueError("an empty prompt: expected token ids [batch, length], length at least 1")
        rows = len(given) if self.batch == "union" else 1
        valid = row_mask(mask, given)
        if self.clusters is None:
            if int(valid.sum(1).max()) < 2:
                warnings.warn("a prompt of one token has no stable core; the answer is dense", stacklevel=6)
                return
            alpha, score = self.alpha, self.score
        else:
            alpha, score = self.clusters.alpha, self.clusters.score
        for slot in self._watched:
            usages = self._usages[slot.site.name] = [Usage.none(slot.site.width, slot.device) for _ in range(rows)]
            hook = slot.write.register_forward_pre_hook(partial(_count, usages, valid, alpha, score))
            self._watch.callback(hook.remove)

    def _choose(self) -> None:
        """The sets, from what was counted; from now on only their neurons are computed."""
        if self.clusters is None:
            found = {name: [usage.core(self.keep) for usage in rows] for name, rows in self._usages.items()}
        else:
            numbers = {self.clusters.predict(usage) for usage in self._usages[self.clusters.probe]}
            found = {s.site.name: [self.clusters.core(n, s.site.name, self.keep) for n in numbers] for s in self._slots}
        self.cores = {name: torch.cat(sets).unique() for name, sets in found.items()}
        self.cores = {name: kept for name, kept in self.cores.items() if len(kept)}
        self._narrowing.narrow(self.cores)

    # --- new sets while decoding ---------------------------------------------------------------------

    def _watch_inputs(self) -> None:
        for slot in self._slots:
            roles = self._seen.setdefault(slot.site.name, {role: [] for role in slot.reads})
            for role, module in slot.reads.items():
                hook = module.register_forward_pre_hook(partial(_keep_input, roles[role]))
                self._watch.callback(hook.remove)

    def _decoded(self) -> int:
        inputs = next(iter(next(iter(self._seen.values())).values())) if self._seen else []
        return sum(x.shape[1] for x in inputs)

    @torch.no_grad()
    def _refresh(self) -> None:
        """The dense activations of the tokens since the last choice, counted with what came before at half weight."""
        for slot in self._slots:
            inputs = {role: torch.cat(parts, 1) for role, parts in self._seen[slot.site.name].items()}
            h = activation(slot.site, inputs, partial(self._dense_tensor, slot))
            rows = self._usages[slot.site.name]
            for usage in rows:
                usage.fade()
            valid = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
            _count(rows, valid, self.alpha, self.score, slot.write, (h,))
        self._seen.clear()
        self._choose()

    def _dense_tensor(self, slot: Slot, name: str) -> Tensor:
        for role, weight in slot.site.reads.items():
            if name in (weight.name, weight.bias):
                own = self._narrowing.dense(slot.reads[role], name.rpartition(".")[2])
                assert own is not None
                return own
        return named_tensor(self.model, name)


def _count(
    usages: list[Usage], valid: Bool[Tensor, "batch length"], alpha: float, score: str, _: nn.Module, args: Any
) -> None:
    """Add the activations of a pass, the rows to one usage together or each to its own."""
    h = args[0].detach().reshape(*valid.shape, -1)
    if len(usages) == 1:
        usages[0].add(h[valid], alpha, score)
        return
    for usage, row, real in zip(usages, h, valid, strict=True):
        usage.add(row[real], alpha, score)


def _keep_input(into: list[Tensor], _: nn.Module, args: Any) -> None:
    x = args[0].detach()
    into.append(x if x.dim() == 3 else x[:, None])
