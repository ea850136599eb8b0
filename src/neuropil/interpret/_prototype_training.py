"""How a prototype network is built, started and trained: the parts of the estimator that know no scikit-learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from neuropil.interpret.prototype_images import MAPS, ConvDecoder, ConvEncoder, activation_named
from neuropil.interpret.prototype_network import LAMBDAS, PrototypeNetwork, reconstruction_error

Augment = Callable[[Tensor], Tensor]
WIDTHS = (64, 40)  # of the dense pair: its last is the size of a code, the paper's 40
EVALUATED = 1000  # rows that go through a network at once where nothing is learned


class Rows(Dataset):
    """Inputs and labels in memory, fetched a batch at a time."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.y[row]

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[rows], self.y[rows]


def loader(x: Tensor, y: Tensor, batch_size: int) -> DataLoader:
    """Shuffled batches; `Rows` makes them whole, so there is nothing to collate."""
    return DataLoader(Rows(x, y), batch_size=batch_size, shuffle=True, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


class Objective(nn.Module):
    """The loss of a batch as a module, so that a checkpoint holds all of it: the network and the bank of codes.

    lambdas     of E, R, R1 and R2; None: cross entropy alone, for a network without prototypes
    memory      how many codes of earlier batches R1 looks at besides the batch's own
    """

    bank: Tensor
    stored: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        lambdas: tuple[float, float, float, float] | None = LAMBDAS,
        *,
        augment: Augment | None = None,
        class_weight: Tensor | None = None,
        memory: int = 0,
        code_size: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.lambdas, self.augment = network, lambdas, augment
        self.register_buffer("class_weight", class_weight)
        self.register_buffer("bank", torch.zeros(memory, code_size))
        self.register_buffer("stored", torch.zeros((), dtype=torch.long))  # codes put into the bank so far

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.augment is not None:
            x = self.augment(x)
        if self.lambdas is None or not isinstance(self.network, PrototypeNetwork):
            return cross_entropy(self.network(x), y, self.class_weight)
        if not len(self.bank):
            return self.network.loss(x, y, self.lambdas, class_weight=self.class_weight)
        bank = self.bank[: min(int(self.stored), len(self.bank))].clone()
        loss = self.network.loss(x, y, self.lambdas, class_weight=self.class_weight, bank=bank)
        self._store(x)
        return loss

    @torch.no_grad()
    def _store(self, x: Tensor) -> None:
        """The newest codes take the places of the oldest."""
        assert isinstance(self.network, PrototypeNetwork)
        codes = self.network.encode(x)[-len(self.bank) :]
        places = (self.stored + torch.arange(len(codes), device=self.bank.device)) % len(self.bank)
        self.bank[places] = codes.to(self.bank.dtype)
        self.stored += len(codes)


class Reconstruction(nn.Module):
    """R alone, for training the autoencoder before prototypes are placed."""

    def __init__(self, network: PrototypeNetwork, augment: Augment | None = None) -> None:
        super().__init__()
        self.network, self.augment = network, augment

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.augment is not None:
            x = self.augment(x)
        return reconstruction_error(self.network.decode(self.network.encode(x)), x)


# --- networks --------------------------------------------------------------------------------------


def dense_encoder(features: int, widths: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers, an activation after each, the last too, as in the paper's encoder."""
    sizes = [features, *widths]
    pairs = [(nn.Linear(a, b), activation_named(activation)) for a, b in pairwise(sizes)]
    return nn.Sequential(nn.Flatten(), *(layer for pair in pairs for layer in pair))


def dense_decoder(shape: tuple[int, ...], widths: Sequence[int], activation: str) -> nn.Sequential:
    """The dense encoder's mirror. Its last layer is linear: a table's columns have no common range."""
    sizes = [math.prod(shape), *widths][::-1]
    pairs = [(nn.Linear(a, b), activation_named(activation)) for a, b in pairwise(sizes)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1], nn.Unflatten(1, shape))


def autoencoder(
    encoder: Any, decoder: Any, shape: tuple[int, ...], layers: tuple[int, ...] | None, activation: str
) -> tuple[nn.Module, nn.Module | None]:
    """The pair that the settings ask for; the user's own modules are copied."""
    own = isinstance(encoder, nn.Module)
    if not own and encoder not in ("auto", "conv", "dense"):
        raise ValueError(f"encoder={encoder!r}: expected 'auto', 'conv', 'dense' or a torch module")
    if not (decoder is None or decoder == "mirror" or isinstance(decoder, nn.Module)):
        raise ValueError(f"decoder={decoder!r}: expected 'mirror', None or a torch module")
    if own and decoder == "mirror":
        raise ValueError("an encoder of your own has no mirror: give a decoder that takes codes [n, q], or None")
    conv = encoder == "conv" or (encoder == "auto" and len(shape) == 3)
    if conv and len(shape) != 3:
        raise ValueError(f"encoder='conv' needs image_shape=(channels, height, width); inputs are {shape}")
    sizes = tuple(layers or (MAPS if conv else WIDTHS))
    if own:
        first = copy.deepcopy(encoder)
    elif conv:
        first = ConvEncoder(shape, maps=sizes, activation=activation)
    else:
        first = dense_encoder(math.prod(shape), sizes, activation)
    if decoder != "mirror":
        return first, copy.deepcopy(decoder)
    if conv:
        return first, ConvDecoder(shape, maps=sizes, activation=activation)
    return first, dense_decoder(shape, sizes, activation)


@torch.no_grad()
def size_of_codes(encoder: nn.Module, x: Float[Tensor, "n ..."]) -> int:
    """How many numbers a code has, by encoding a row."""
    was = [module for module in encoder.modules() if module.training]
    found = encoder.eval()(x[:1])
    for module in was:
        module.training = True
    if not isinstance(found, Tensor) or found.shape[:1] != (1,):
        raise ValueError(f"the encoder gives {type(found).__name__} for one row; expected a tensor of one code a row")
    return found.numel()


# --- starting prototypes at codes of the data --------------------------------------------------------


@torch.no_grad()
def encoded(network: PrototypeNetwork, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n q"]:
    """Codes of all rows, some at a time."""
    return torch.cat([network.encode(part) for part in x.split(EVALUATED)])


def start(network: PrototypeNetwork, x: Tensor, y: Int[Tensor, " n"], init: str, seed: int) -> None:
    """Put the prototypes at codes of training rows: spread out ("k-means++"), or of each class in turn ("classes")."""
    count = len(network.prototypes.codes)
    if count > len(x):
        raise ValueError(f"{count} prototypes cannot start at {len(x)} training rows; use init='uniform'")
    codes = encoded(network, x)
    if init == "k-means++":
        _, rows = kmeans_plusplus(codes.double().cpu().numpy(), count, random_state=seed)
    else:
        rows = in_turn(y.cpu().numpy(), count, np.random.default_rng(seed))
    with torch.no_grad():
        network.prototypes.codes.copy_(codes[torch.as_tensor(rows)])


def in_turn(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random rows, one of each class in turn; classes that are used up are passed over."""
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        rank[own] = np.arange(len(own))
    return np.lexsort((labels, rank))[:count]
