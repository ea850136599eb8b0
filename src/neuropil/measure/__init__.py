"""How much data, bias, energy and certainty."""

from neuropil.measure.data_diet import el2n_scores, example_scores, grand_scores, train_and_score
from neuropil.measure.forgetting import Forgetting

__all__ = ["Forgetting", "el2n_scores", "example_scores", "grand_scores", "train_and_score"]
