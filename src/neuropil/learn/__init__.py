"""Other ways to learn."""

from neuropil.learn.bone import add_bone, disable_bone, merge_bone, remove_bone, unmerge_bone, use_bone
from neuropil.learn.bone_files import load_bone, save_bone

__all__ = [
    "add_bone",
    "disable_bone",
    "load_bone",
    "merge_bone",
    "remove_bone",
    "save_bone",
    "unmerge_bone",
    "use_bone",
]
