r"""A head that scores by squared distances to learned codes, on any encoder, and the four terms that train it.

$d_j(z) = \|z - p_j\|^2$ for a code $z = f(x)$ and prototypes $p_1, ..., p_m$, and the logits are $W d(z)$ without a
bias, so that a score is nothing but the sum of its prototypes' contributions $W_{kj} d_j$:

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> network = PrototypeNetwork(nn.Linear(6, 4), nn.Linear(4, 6), n_prototypes=5, code_size=4, n_classes=3)
>>> x, y = torch.randn(8, 6), torch.randint(3, (8,))
>>> network.contributions(x).shape, bool(torch.allclose(network.contributions(x).sum(2), network(x), atol=1e-5))
(torch.Size([8, 3, 5]), True)
>>> network.loss(x, y, lambdas=(20.0, 1.0, 1.0, 1.0)).backward()
>>> network.decode(network.prototypes.codes).shape  # what the reference cases look like
torch.Size([5, 6])

The terms, over a batch of n:
$$E = \text{cross entropy},\quad R = \tfrac1n \sum_i \|g(f(x_i)) - x_i\|^2,\quad
R_1 = \tfrac1m \sum_j \min_i \|p_j - f(x_i)\|^2,\quad R_2 = \tfrac1n \sum_i \min_j \|f(x_i) - p_j\|^2.$$
$R_1$ draws every prototype to some input, $R_2$ every input to some prototype; $R$ makes codes, prototypes among
them, decodable.

Distances are taken from differences, not from $\|z\|^2 + \|p\|^2 - 2 z p$ as in the authors' code: they are then
never negative and exactly 0 where a code is a prototype.

Source: Oscar Li, Hao Liu, Chaofan Chen and Cynthia Rudin, "Deep Learning for Case-Based Reasoning through Prototypes:
A Neural Network that Explains Its Predictions", AAAI 2018, arXiv:1710.04806.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LAMBDAS = (20.0, 1.0, 1.0, 1.0)  # of E, R, R1 and R2: the authors' code; divided by 20, the paper's 0.05


class PrototypeLayer(nn.Module):
    """Squared distances of codes to `n_prototypes` trainable codes, which begin uniform in (0, 1).

    >>> layer = PrototypeLayer(5, 3)
    >>> layer(torch.zeros(2, 7, 3)).shape
    torch.Size([2, 7, 5])
    """

    def __init__(self, n_prototypes: int, code_size: int) -> None:
        super().__init__()
        if n_prototypes < 1 or code_size < 1:
            raise ValueError(f"{n_prototypes} prototypes of {code_size} numbers: both must be 1 or more")
        self.codes = nn.Parameter(torch.rand(n_prototypes, code_size))

    def forward(self, z: Float[Tensor, "*n q"]) -> Float[Tensor, "*n m"]:
        if z.shape[-1] != self.codes.shape[1]:
            raise ValueError(f"codes of {z.shape[-1]} numbers for prototypes of {self.codes.shape[1]}")
        return (z.unsqueeze(-2) - self.codes).square().sum(-1)


class Terms(NamedTuple):
    """The loss, term by term, not yet weighted."""

    classification: Float[Tensor, ""]  # E
    reconstruction: Float[Tensor, ""]  # R, summed over what an input holds
    prototype: Float[Tensor, ""]  # R1
    coverage: Float[Tensor, ""]  # R2


class PrototypeNetwork(nn.Module):
    """Encoder, prototypes, one linear layer without bias, and a decoder for looking at codes.

    encoder      inputs [n, ...] to codes; codes with more axes than [n, q] are flattened
    decoder      codes [n, q] back to inputs, or None: then there is no R, and nothing is decoded
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module | None, *, n_prototypes: int, code_size: int, n_classes: int
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.prototypes = PrototypeLayer(n_prototypes, code_size)
        self.classifier = nn.Linear(n_prototypes, n_classes, bias=False)
        nn.init.uniform_(self.classifier.weight, 0.0, 1.0)

    def encode(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n q"]:
        return self.encoder(x).flatten(1)

    def decode(self, z: Float[Tensor, "n q"]) -> Float[Tensor, "n ..."]:
        """What codes stand for. Raises ValueError where there is no decoder."""
        if self.decoder is None:
            raise ValueError("this network has no decoder; give one, or look at the nearest training cases")
        return self.decoder(z)

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        return self.classifier(self.prototypes(self.encode(x)))

    def contributions(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n k m"]:
        """W_kj d_j: what prototype j adds to the score of class k."""
        return self.classifier.weight * self.prototypes(self.encode(x)).unsqueeze(1)

    def terms(self, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> Terms:
        """All four terms of a batch; R is 0 where there is no decoder."""
        parts = self._parts(x, y, None, None)
        if self.decoder is None:
            parts[1] = lambda: x.new_zeros(())
        return Terms(*(part() for part in parts))

    def loss(
        self,
        x: Float[Tensor, "n ..."],
        y: Int[Tensor, " n"],
        lambdas: tuple[float, float, float, float] = LAMBDAS,
        *,
        class_weight: Float[Tensor, " k"] | None = None,
        bank: Float[Tensor, "b q"] | None = None,
    ) -> Float[Tensor, ""]:
        """The terms weighted by `lambdas` (E, R, R1, R2) and added; one with weight 0 is not computed.

        class_weight   of each class in E
        bank           codes of earlier batches, among which R1 looks too
        """
        check_lambdas(lambdas)
        parts = self._parts(x, y, class_weight, bank)
        return torch.stack([weight * part() for weight, part in zip(lambdas, parts, strict=True) if weight]).sum()

    def _parts(
        self, x: Tensor, y: Tensor, class_weight: Tensor | None, bank: Tensor | None
    ) -> list[Callable[[], Tensor]]:
        z = self.encode(x)
        d = self.prototypes(z)
        return [
            lambda: cross_entropy(self.classifier(d), y, class_weight),
            lambda: reconstruction_error(self.decode(z), x),
            lambda: prototype_error(d if bank is None else torch.cat([d, self.prototypes(bank)])),
            lambda: coverage_error(d),
        ]


def reconstruction_error(found: Float[Tensor, "n ..."], wanted: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """R: squared differences, summed over an input's numbers (so it grows with their count), mean over inputs."""
    if found.numel() != wanted.numel():
        raise ValueError(f"the decoder gives {tuple(found.shape)} for inputs of shape {tuple(wanted.shape)}")
    return (found.flatten(1) - wanted.flatten(1)).square().sum(1).mean()


def prototype_error(distances: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """R1: from each prototype to the nearest input."""
    return distances.min(0).values.mean()


def coverage_error(distances: Float[Tensor, "n m"]) -> Float[Tensor, ""]:
    """R2: from each input to the nearest prototype."""
    return distances.min(1).values.mean()


def check_lambdas(lambdas: tuple[float, ...]) -> None:
    """Raises ValueError unless all are 0 or more, and one above 0."""
    if not (all(0 <= weight < float("inf") for weight in lambdas) and any(lambdas)):
        raise ValueError(f"lambdas {lambdas} of E, R, R1 and R2: expected numbers of 0 or more, not all 0")


def dense_network(encoder: nn.Module, *, width: int, code_size: int, n_classes: int) -> nn.Sequential:
    """The non-interpretable network to compare with: the encoder, a dense layer in the prototypes' place, logits.

    >>> dense_network(nn.Linear(6, 4), width=5, code_size=4, n_classes=3)(torch.zeros(2, 6)).shape
    torch.Size([2, 3])
    """
    head = (nn.Linear(code_size, width), nn.ReLU(), nn.Linear(width, n_classes))
    return nn.Sequential(encoder, nn.Flatten(), *head)
