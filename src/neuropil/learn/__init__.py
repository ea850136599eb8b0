"""Other ways to learn."""

from neuropil.learn.eqprop import (
    EquilibriumNetwork,
    EquilibriumPropagation,
    ep_grad,
    error_alignment,
    gradient_angle,
    jacobian_homeostasis_loss,
    symmetry_score,
)

__all__ = [
    "EquilibriumNetwork",
    "EquilibriumPropagation",
    "ep_grad",
    "error_alignment",
    "gradient_angle",
    "jacobian_homeostasis_loss",
    "symmetry_score",
]
