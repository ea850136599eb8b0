"""The skeleton: a model's modules and names without its weights, and where each weight lies in a checkpoint.

A checkpoint does not always hold a parameter under the name and in the form the module has it: a prefix is
missing, experts are stored one by one and fused by transformers, an embedding is tied to the head.
transformers describes these changes as rules; here they are turned round, into one recipe a parameter, so
that any one parameter can be read without reading the others.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from neuropil.errors import ModelError
from neuropil.models.stores import Store

_HEADS = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
)


@runtime_checkable
class Reader(Protocol):
    """Reads one parameter, by its name in the module."""

    sources: dict[str, Any]

    def read(self, parameter: str) -> Tensor: ...


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice, which concern models that it loads by itself."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def model_class(config: Any, where: str) -> type[nn.Module]:
    """The class that a config asks for: by `architectures`, else with the head its type usually has."""
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    if config.architectures:
        raise ModelError(
            f"{where}: its config asks for {', '.join(config.architectures)}, which transformers "
            f"{transformers.__version__} has not. neuropil runs no code from checkpoints; upgrade "
            "transformers, or "
            "build the module yourself and pass it to load()"
        )
    for auto in (*_HEADS, "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    raise ModelError(f"{where}: transformers has no model for configs of type {config.model_type!r}")


def build(config: Any, where: str) -> nn.Module:
    """The model on the meta device: every module and shape, no weights."""
    cls: Any = model_class(config, where)
    try:
        with quiet(), torch.device("meta"):
            return cls._from_config(copy.deepcopy(config)).eval()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{where}: {cls.__name__} cannot be built from its config ({error}); check config.json") from (
            error
        )


def ties(skeleton: nn.Module) -> dict[str, str]:
    """Parameters that are another parameter: tied name -> name it is tied to."""
    tied = dict(getattr(skeleton, "all_tied_weights_keys", None) or {})
    first: dict[int, str] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        source = first.setdefault(id(parameter), name)
        if source != name:
            tied.setdefault(name, source)
    return tied


@dataclass
class _Recipe:
    converter: Any  # a WeightConverter of transformers, None for a tensor taken as it is
    key: str  # the name transformers files the recipe under: its first target
    parts: list[tuple[str, str]]  # (pattern that matched, name in the checkpoint)


class Recipes:
    """How every parameter of a skeleton is made from the tensors of a Hugging Face checkpoint."""

    def __init__(self, store: Store, skeleton: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        self.store, self.skeleton = store, skeleton
        self.sources: dict[str, _Recipe] = {}
        rules = get_model_conversion_mapping(skeleton)  # type: ignore[arg-type]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = getattr(skeleton, "base_model_prefix", "")
        known = skeleton.state_dict()
        for key in sorted(store.shapes, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            rule = by_pattern.get(pattern) if pattern is not None else None
            for target in _targets(name, rule):
                if target in known:
                    recipe = self.sources.setdefault(target, _Recipe(rule, name, []))
                    recipe.parts.append((pattern or key, key))

    def read(self, parameter: str) -> Tensor:
        recipe = self.sources[parameter]
        if recipe.converter is None:
            return self.store.read(recipe.parts[-1][1])
        converter = copy.deepcopy(recipe.converter)
        for pattern, key in recipe.parts:
            converter.add_tensor(recipe.key, key, pattern, self.store.read(key))
        made = converter.convert(recipe.key, model=self.skeleton, config=getattr(self.skeleton, "config", None))
        tensor = made[parameter]
        return tensor[0] if isinstance(tensor, list) else tensor


def _targets(name: str, rule: Any) -> list[str]:
    """All parameters that a rule makes of one key; `name` is the first."""
    if rule is None or len(rule.target_patterns) == 1:
        return [name]
    first = rule.target_patterns[0]
    return [name.replace(first, target) for target in rule.target_patterns]
