r"""A classifier that answers with cases: every score is a sum over a few prototypes that can be looked at.

An encoder f gives a code; the score of class k is $\sum_j W_{kj} \|f(x) - p_j\|^2$ over m learned codes $p_j$, without
a bias. A decoder shows each prototype as an input. The explanation of a prediction is no second model: it is the sum
that was computed, term by term.

>>> from sklearn.datasets import load_digits
>>> X, y = load_digits(return_X_y=True)
>>> X = X / 16
>>> digits = PrototypeClassifier(15, image_shape=(1, 8, 8), encoder="dense", epochs=30, batch_size=50, random_state=0)
>>> digits = digits.fit(X[:1000], y[:1000])
>>> digits.score(X[1000:], y[1000:]) > 0.8
True
>>> why = digits.explain(X[1000:1001])[0]
>>> nearest = why.references[0]
>>> abs(sum(case.contribution for case in why.references) - why.score) < 1e-3
True
>>> nearest.decoded.shape, nearest.case.shape
((1, 8, 8), (1, 8, 8))

`print(why)` gives the table of reference cases, `why.sheet()` draws it; `prototype_quality` says in numbers whether
prototypes look like data and data lie near prototypes. The loss is
$\lambda_{class} E + \lambda_{ae} R + \lambda_1 R_1 + \lambda_2 R_2$ (`neuropil.interpret.prototype_network` has the
terms, and the layer for networks of your own); a weight of 0 switches its term off: without $R_1$ prototypes may drift
to where there are no data, without $R_2$ data need not lie near any prototype, without R nothing can be decoded.
`head="dense"` is the network to compare with, which explains nothing.

R is a *sum* over what an input holds: for inputs much larger than the paper's 784 pixels lower `lambda_ae` in
proportion. Prototypes can fall together or all stand for a few classes: `prototype_quality` counts both.
Columns of a table should have like scales (`StandardScaler`), for R and the defaults know none.

Defaults are those of the authors' code: 15 prototypes and W from U(0, 1), Adam at 0.002, batches of 250, 1500 epochs,
weights 20, 1, 1, 1 (the paper writes 1, 0.05, 0.05, 0.05), ReLU where the paper's text has sigmoids
(`activation="sigmoid"`). For its MNIST recipe give `image_shape=(1, 28, 28)` and `augment="elastic"`.
Beyond the paper: prototypes that start at codes (`init`), after an autoencoder alone has been trained
(`pretrain_epochs`); `memory` for batches too small for R1; `project`, which moves prototypes onto training cases.

Source: Oscar Li, Hao Liu, Chaofan Chen and Cynthia Rudin, "Deep Learning for Case-Based Reasoning through Prototypes:
A Neural Network that Explains Its Predictions", AAAI 2018, arXiv:1710.04806. Moving prototypes onto cases: Chen, Li,
Tao, Barnett, Su and Rudin, "This Looks Like That", NeurIPS 2019, arXiv:1806.10574.
"""

from __future__ import annotations

import copy
import math
import warnings
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state, compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from neuropil import training
from neuropil.interpret._prototype_files import loaded, saved
from neuropil.interpret._prototype_training import (
    EVALUATED,
    Objective,
    Reconstruction,
    autoencoder,
    encoded,
    loader,
    size_of_codes,
    start,
)
from neuropil.interpret.prototype_explanation import Explanation, explanations
from neuropil.interpret.prototype_images import ElasticDeformation
from neuropil.interpret.prototype_network import PrototypeNetwork, check_lambdas, dense_network

KEPT = 5  # nearest training cases kept of each prototype
INITS, HEADS = ("uniform", "k-means++", "classes"), ("prototypes", "dense")


class PrototypeClassifier(ClassifierMixin, BaseEstimator):
    """Classify by distances to learned, decodable prototypes.

    Parameters
    ----------
    n_prototypes: m; with fewer than classes a warning says so.
    encoder: "conv" (the paper's), "dense", "auto" (conv for images) or a torch module, which is copied, not changed.
        A module's parameters that need no gradient stay as they are.
    decoder: "mirror" of a built-in encoder, None, or a torch module that takes codes [n, q].
    image_shape: (channels, height, width) of rows; known where X is [n, channels, height, width].
    layers: feature maps (conv; default 32, 32, 32, 10) or widths (dense; default 64, 40) of the built-in encoder.
    activation: of the built-in networks: "relu", "sigmoid", "tanh" or "elu".
    head: "prototypes", or "dense": m hidden units in their place, cross entropy alone.
    lambda_class, lambda_ae, lambda_1, lambda_2: weights of E, R, R1 and R2; 0 switches a term off. R needs a decoder.
    init: "uniform" in (0, 1); at codes of training rows: "k-means++", or "classes", of each class in turn.
    pretrain_epochs: of the autoencoder alone, before prototypes start.
    memory: codes of earlier batches that R1 looks at too; for batches not much larger than m.
    augment: None, "elastic" (images), or a function of a batch of inputs; of training batches alone.
    class_weight: None, "balanced" or {label: weight}, in E.
    lr, batch_size, epochs: of Adam.
    accelerator: where Lightning Fabric trains: "cpu", "cuda", "auto". The fitted network is on the CPU.
    checkpoint: a file; a fit that was stopped goes on from it, and one with more `epochs` goes on to those. The same
        data and settings are expected.
    progress: show a bar.
    random_state: of all that is drawn.

    Fitted: `classes_`, `network_`, `prototypes_` [m, q], `weights_` [k, m] (negative where a prototype speaks for a
    class), `prototype_classes_` [m], `nearest_` [m, 5] (rows of the training data nearest to each prototype, by code),
    `nearest_distances_` (squared), `nearest_labels_`, `cases_` (those rows), `losses_` (of every step).
    """

    def __init__(
        self,
        n_prototypes: Any = 15,
        *,
        encoder: Any = "auto",
        decoder: Any = "mirror",
        image_shape: Any = None,
        layers: Any = None,
        activation: Any = "relu",
        head: Any = "prototypes",
        lambda_class: Any = 20.0,
        lambda_ae: Any = 1.0,
        lambda_1: Any = 1.0,
        lambda_2: Any = 1.0,
        init: Any = "uniform",
        pretrain_epochs: Any = 0,
        memory: Any = 0,
        augment: Any = None,
        class_weight: Any = None,
        lr: Any = 0.002,
        batch_size: Any = 250,
        epochs: Any = 1500,
        accelerator: Any = "cpu",
        checkpoint: Any = None,
        progress: Any = False,
        random_state: Any = None,
    ) -> None:
        # Any: a scikit-learn estimator takes whatever it is given here, and checks it in fit.
        self.n_prototypes, self.encoder, self.decoder, self.image_shape = n_prototypes, encoder, decoder, image_shape
        self.layers, self.activation, self.head = layers, activation, head
        self.lambda_class, self.lambda_ae, self.lambda_1, self.lambda_2 = lambda_class, lambda_ae, lambda_1, lambda_2
        self.init, self.pretrain_epochs, self.memory, self.augment = init, pretrain_epochs, memory, augment
        self.class_weight, self.lr, self.batch_size, self.epochs = class_weight, lr, batch_size, epochs
        self.accelerator, self.checkpoint, self.progress = accelerator, checkpoint, progress
        self.random_state = random_state

    # --- fitting ---------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> PrototypeClassifier:
        """Learn from inputs `X` [n, p] or [n, channels, height, width] and labels `y` [n].

        Raises ValueError for settings out of range, for values that are not finite (naming the column), for an
        encoder and decoder that do not fit the data; ModelError where training diverges.
        """
        self._check_settings()
        x, labels = self._training_data(X, y)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(x)
        self._start(x, labels, seed)
        objective = Objective(
            self.network_,
            self._lambdas() if self.head == "prototypes" else None,
            augment=self._augmentation(),
            class_weight=self._class_weights(labels),
            memory=int(self.memory),
            code_size=self.code_size_,
        )
        self.losses_ = self._train(objective, x, labels, int(self.epochs), seed, self.checkpoint)
        if self.head == "prototypes":
            self._find_cases(x, labels)
        return self

    def _check_settings(self) -> None:
        counts = {
            "n_prototypes": (self.n_prototypes, 1),
            "batch_size": (self.batch_size, 1),
            "epochs": (self.epochs, 1),
        }
        counts |= {"pretrain_epochs": (self.pretrain_epochs, 0), "memory": (self.memory, 0)}
        for name, (value, least) in counts.items():
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more")
        for name, value, choices in (("init", self.init, INITS), ("head", self.head, HEADS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: expected a learning rate above 0")
        check_lambdas(self._lambdas())
        if self.head == "prototypes" and self.pretrain_epochs and self.decoder is None:
            raise ValueError("pretrain_epochs trains an autoencoder, and decoder is None")

    def _lambdas(self) -> tuple[float, float, float, float]:
        reconstruction = 0.0 if self.decoder is None else float(self.lambda_ae)
        return float(self.lambda_class), reconstruction, float(self.lambda_1), float(self.lambda_2)

    def _training_data(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Inputs in the encoder's shape and class numbers; sets `classes_` and `input_shape_`."""
        shape = tuple(X.shape[1:]) if getattr(X, "ndim", 0) == 4 else None
        rows, y = validate_data(self, flat(X), y, dtype=np.float32, ensure_all_finite=False)
        self._check_finite(rows)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self.input_shape_ = tuple(self.image_shape or shape or rows.shape[1:])
        if math.prod(self.input_shape_) != rows.shape[1]:
            raise ValueError(f"image_shape={self.input_shape_} for rows of {rows.shape[1]} numbers")
        if self.head == "prototypes" and self.n_prototypes < len(self.classes_):
            warnings.warn(
                f"{self.n_prototypes} prototypes for {len(self.classes_)} classes: some class has none of its own",
                UserWarning,
                stacklevel=3,
            )
        return self._inputs(rows), torch.from_numpy(numbers.astype(np.int64))

    def _check_finite(self, rows: np.ndarray) -> None:
        bad = np.argwhere(~np.isfinite(rows))
        if not len(bad):
            return
        row, column = bad[0]
        names = getattr(self, "feature_names_in_", None)
        named = f"{column}" if names is None else f"{column} ({names[column]!r})"
        value = "NaN" if np.isnan(rows[row, column]) else "infinity"
        raise ValueError(f"Input X contains {value}, first in column {named} of row {row}; impute or drop such rows")

    def _inputs(self, rows: np.ndarray) -> Tensor:
        own = rows if rows.flags.writeable else rows.copy()  # torch shares memory, and warns of what is read-only
        return torch.from_numpy(np.ascontiguousarray(own)).reshape(-1, *self.input_shape_)

    def _build(self, x: Tensor) -> None:
        """`network_`, untrained. Random numbers come from torch's generator."""
        encoder, decoder = autoencoder(self.encoder, self.decoder, self.input_shape_, self.layers, self.activation)
        self.code_size_ = size_of_codes(encoder, x)
        sizes: dict[str, int] = {"code_size": self.code_size_, "n_classes": len(self.classes_)}
        self.network_: nn.Module
        if self.head == "prototypes":
            self.network_ = PrototypeNetwork(encoder, decoder, n_prototypes=int(self.n_prototypes), **sizes)
        else:
            self.network_ = dense_network(encoder, width=int(self.n_prototypes), **sizes)

    def _start(self, x: Tensor, labels: Tensor, seed: int) -> None:
        """Train the autoencoder alone and place the prototypes, where the settings say so."""
        if self.head != "prototypes" or (self.checkpoint is not None and Path(self.checkpoint).exists()):
            return  # what a checkpoint holds has been started already
        network = self._prototype_network()
        if self.pretrain_epochs:
            self._train(Reconstruction(network, self._augmentation()), x, labels, int(self.pretrain_epochs), seed)
        if self.init != "uniform":
            start(network.eval(), x, labels, self.init, seed)

    def _augmentation(self) -> Any:
        if self.augment != "elastic":
            return self.augment
        if len(self.input_shape_) != 3:
            raise ValueError(f"augment='elastic' bends images, and inputs are {self.input_shape_}; give image_shape")
        return ElasticDeformation()

    def _class_weights(self, labels: Tensor) -> Tensor | None:
        if self.class_weight is None:
            return None
        own = self.classes_[labels.numpy()]
        weights = compute_class_weight(self.class_weight, classes=self.classes_, y=own)
        return torch.from_numpy(weights.astype(np.float32))

    def _train(
        self, objective: nn.Module, x: Tensor, labels: Tensor, epochs: int, seed: int, checkpoint: Any = None
    ) -> list[float]:
        """Adam over shuffled batches; the losses of its steps. The network ends on the CPU, in evaluation mode."""
        learned = [p for p in objective.parameters() if p.requires_grad]
        run = training.fit(
            objective.train(),
            loader(x, labels, int(self.batch_size)),
            lambda model, batch: model(*batch),
            torch.optim.Adam(learned, lr=float(self.lr)),
            epochs=epochs,
            seed=seed,
            accelerator=self.accelerator,
            progress=bool(self.progress),
            checkpoint=checkpoint,
        )
        objective.cpu().eval()
        return run.losses

    def _find_cases(self, x: Tensor, labels: Tensor) -> None:
        """The training rows nearest to each prototype, by code."""
        network = self._prototype_network()
        with torch.no_grad():
            distances = self._in_parts(x, lambda part: network.prototypes(network.encode(part)))
        kept, rows = distances.topk(min(KEPT, len(x)), 0, largest=False)
        self.nearest_, self.nearest_distances_ = rows.T.numpy().copy(), kept.T.numpy().copy()
        self.nearest_labels_ = self.classes_[labels.numpy()[self.nearest_]]
        self.cases_ = x[rows.T].numpy()

    # --- predicting ------------------------------------------------------------------------------

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row."""
        scores = self._through(X, lambda part: self.network_(part))
        return self.classes_[scores.argmax(1)]

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n k"]:
        """Softmax of the scores; columns as `classes_`."""
        return self._through(X, lambda part: self.network_(part).softmax(1))

    def distances(self, X: Any) -> Float[np.ndarray, "n m"]:
        """Squared distances of codes to prototypes: all that a score is computed from."""
        network = self._prototype_network()
        return self._through(X, lambda part: network.prototypes(network.encode(part)))

    def contributions(self, X: Any) -> Float[np.ndarray, "n k m"]:
        """What each prototype adds to the score of each class; their sum over prototypes is the score."""
        return self._through(X, self._prototype_network().contributions)

    def encode(self, X: Any) -> Float[np.ndarray, "n q"]:
        """Codes."""
        return self._through(X, self._prototype_network().encode)

    def reconstruct(self, X: Any) -> np.ndarray:
        """Inputs through the encoder and the decoder: how far to trust what a decoder shows."""
        network = self._prototype_network()
        return self._through(X, lambda part: network.decode(network.encode(part)))

    def _through(self, X: Any, act: Any) -> np.ndarray:
        check_is_fitted(self)
        rows = validate_data(self, flat(X), dtype=np.float32, reset=False, ensure_all_finite=False)
        self._check_finite(rows)
        with torch.no_grad():
            return self._in_parts(self._inputs(rows), act).numpy()

    @staticmethod
    def _in_parts(x: Tensor, act: Any) -> Tensor:
        return torch.cat([act(part) for part in x.split(EVALUATED)])

    # --- prototypes and explanations ---------------------------------------------------------------

    def _prototype_network(self) -> PrototypeNetwork:
        check_is_fitted(self)
        if not isinstance(self.network_, PrototypeNetwork):
            raise ValueError("head='dense' has no prototypes and explains nothing; fit with head='prototypes'")
        return self.network_

    @property
    def prototypes_(self) -> Float[np.ndarray, "m q"]:
        return self._prototype_network().prototypes.codes.detach().numpy().copy()

    @property
    def weights_(self) -> Float[np.ndarray, "k m"]:
        return self._prototype_network().classifier.weight.detach().numpy().copy()

    @property
    def prototype_classes_(self) -> np.ndarray:
        """The class each prototype speaks for most: the most negative weight."""
        return self.classes_[self.weights_.argmin(0)]

    def decode_prototypes(self) -> np.ndarray | None:
        """Prototypes as inputs [m, ...]; None where there is no decoder."""
        network = self._prototype_network()
        if network.decoder is None:
            return None
        with torch.no_grad():
            return network.decode(network.prototypes.codes).reshape(-1, *self.input_shape_).numpy()

    def explain(self, X: Any, of: Any = None) -> list[Explanation]:
        """Why each row got its class, or, for the label `of`, where that class's score comes from.

        Raises ValueError for a label that is not in `classes_`.
        """
        self._prototype_network()
        labels = self.classes_.tolist()
        if of is not None and of not in labels:
            raise ValueError(f"of={of!r} is no class; those are {', '.join(map(str, labels))}")
        parts, distances, shares = self.contributions(X), self.distances(X), self.predict_proba(X)
        inputs = np.asarray(flat(X), dtype=np.float32).reshape(-1, *self.input_shape_)
        return explanations(self, inputs, parts, distances, shares, None if of is None else labels.index(of))

    def project(self, X: Any, y: Any) -> PrototypeClassifier:
        """A copy whose prototypes are codes of the training rows nearest to them, so that each is a case.

        Give the data of `fit`, and compare the copy's score with this one's: W was learned for the prototypes as they
        were.
        """
        self._prototype_network()
        projected = copy.deepcopy(self)
        x, labels = projected._training_data(X, y)
        if not np.array_equal(projected.classes_, self.classes_):
            raise ValueError(f"these labels have classes {projected.classes_}, those of fit {self.classes_}")
        projected._find_cases(x, labels)
        network = projected._prototype_network()
        with torch.no_grad():
            network.prototypes.codes.copy_(encoded(network, x[projected.nearest_[:, 0]]))
        projected._find_cases(x, labels)
        return projected

    # --- files -------------------------------------------------------------------------------------

    def save(self, path: Path | str) -> Path:
        """Write the fitted classifier to a file that holds numbers and names, no code."""
        check_is_fitted(self)
        return saved(self, Path(path))

    @classmethod
    def load(cls, path: Path | str, **modules: Any) -> PrototypeClassifier:
        """What `save` wrote. Settings that were modules or functions (`encoder`, `decoder`, `augment`) are given anew.

        Raises ModelError for a file that is none of these, ValueError for a module that is missing or does not fit.
        """
        return loaded(cls, Path(path), modules)


def flat(X: Any) -> Any:
    """Images [n, channels, height, width] as rows [n, p]; anything else as it is."""
    return np.asarray(X).reshape(len(X), -1) if getattr(X, "ndim", 0) == 4 else X
