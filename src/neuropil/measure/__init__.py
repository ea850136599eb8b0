"""How much data, bias, energy and certainty."""

from neuropil.measure.annealing_law import AnnealingLaw, areas, best_schedule, choose_lambda
from neuropil.measure.loss_curves import Curve, read_curve
from neuropil.measure.power_law import ChinchillaLaw

__all__ = ["AnnealingLaw", "ChinchillaLaw", "Curve", "areas", "best_schedule", "choose_lambda", "read_curve"]
