"""How much data, bias, energy and certainty."""

from neuropil.measure.annealing_law import AnnealingLaw, areas, best_schedule, choose_lambda
from neuropil.measure.data_diet import el2n_scores, example_scores, grand_scores, train_and_score
from neuropil.measure.forgetting import Forgetting
from neuropil.measure.loss_curves import Curve, read_curve
from neuropil.measure.power_law import ChinchillaLaw
from neuropil.measure.quantile import (
    QuantileAggregator,
    QuantileNetwork,
    calibration_error,
    conformity_scores,
    coverage,
    coverage_error,
    cqr,
    crossing_penalty,
    crossing_rate,
    crps,
    cv_plus,
    default_models,
    interval_score,
    isotonize,
    paper_models,
    pinball,
    wis,
)

__all__ = [
    "AnnealingLaw",
    "ChinchillaLaw",
    "Curve",
    "Forgetting",
    "QuantileAggregator",
    "QuantileNetwork",
    "areas",
    "best_schedule",
    "calibration_error",
    "choose_lambda",
    "conformity_scores",
    "coverage",
    "coverage_error",
    "cqr",
    "crossing_penalty",
    "crossing_rate",
    "crps",
    "cv_plus",
    "default_models",
    "el2n_scores",
    "example_scores",
    "grand_scores",
    "interval_score",
    "isotonize",
    "paper_models",
    "pinball",
    "read_curve",
    "train_and_score",
    "wis",
]
