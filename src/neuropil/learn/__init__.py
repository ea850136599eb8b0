"""Other ways to learn."""

from neuropil.learn.bone import add_bone, disable_bone, merge_bone, remove_bone, unmerge_bone, use_bone
from neuropil.learn.bone_files import load_bone, save_bone
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
    "add_bone",
    "disable_bone",
    "ep_grad",
    "error_alignment",
    "gradient_angle",
    "jacobian_homeostasis_loss",
    "load_bone",
    "merge_bone",
    "remove_bone",
    "save_bone",
    "symmetry_score",
    "unmerge_bone",
    "use_bone",
]
