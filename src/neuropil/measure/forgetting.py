"""How often does training forget an example that it had learned?

A tracker for any training loop: an *event* is an example that was classified correctly the last time it was in
a minibatch and is not now. An example starts as incorrect, is looked at only when it is in the minibatch (with
the logits of the training step itself), and scores infinity if it was never classified correctly.

>>> import torch
>>> tracker = Forgetting(3)
>>> right = torch.tensor([[0.0, 1.0]]); wrong = torch.tensor([[1.0, 0.0]])
>>> for logits in (right, wrong, right, wrong):
...     tracker.update(torch.tensor([0]), logits, torch.tensor([1]))   # in the loss: (places, logits, labels)
>>> tracker.update(torch.tensor([1, 2]), torch.cat([right, wrong]), torch.tensor([1, 1]))
>>> tracker.scores().tolist()
[2.0, 0.0, inf]

Source: Toneva, Sordoni, Tachet des Combes, Trischler, Bengio and Gordon, "An empirical study of example
forgetting during deep neural network learning", 2019, arXiv:1812.05159; here as the baseline of data diets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

__all__ = ["Forgetting"]

STATE = ("correct", "learned", "seen", "events")


class Forgetting:
    """Counts forgetting events of `n` examples, numbered from 0 by their place in the data set."""

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"Forgetting({n}): expected the number of training examples, 1 or more")
        self.correct = torch.zeros(n, dtype=torch.bool)
        self.learned, self.seen = self.correct.clone(), self.correct.clone()
        self.events = torch.zeros(n, dtype=torch.int64)

    def update(self, places: Int[Tensor, " b"], logits: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]) -> None:
        """Take note of a minibatch."""
        self.record(places, logits.detach().argmax(1) == labels)

    def record(self, places: Int[Tensor, " b"], correct: Bool[Tensor, " b"]) -> None:
        """The same, where it is known already which examples were classified correctly."""
        places, correct = places.cpu(), correct.cpu()
        if bool((places < 0).any()) or bool((places >= len(self.events)).any()):
            raise ValueError(f"places {places.min()} to {places.max()}; expected 0 to {len(self.events) - 1}")
        self.events[places[self.correct[places] & ~correct]] += 1
        self.correct[places] = correct
        self.learned[places] |= correct
        self.seen[places] = True

    def scores(self) -> Float64[Tensor, " n"]:
        """Events of each example; infinity for those never classified correctly.

        Raises ValueError where an example was never in a minibatch.
        """
        missing = int((~self.seen).sum())
        if missing:
            raise ValueError(f"{missing} of {len(self.seen)} examples were in no minibatch; train for a whole epoch")
        return torch.where(self.learned, self.events.double(), torch.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs to count on."""
        return {name: getattr(self, name).clone() for name in STATE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError for another number of examples."""
        sizes = {name: len(state[name]) if name in state else None for name in STATE}
        if set(sizes.values()) != {len(self.events)}:
            raise ValueError(f"a state of {sizes} examples for a tracker of {len(self.events)}; expected the same")
        for name in STATE:
            getattr(self, name).copy_(state[name])
