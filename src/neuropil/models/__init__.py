"""Models: loaded from any of the usual formats, read one tensor at a time.

>>> import torch
>>> model = load(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)))
>>> model.parameters, [site.width for site in model.sites]
(32, [5])
"""

from neuropil.models.loading import load
from neuropil.models.model import Head, Model
from neuropil.models.packed_files import about_packed, load_packed, save_packed
from neuropil.models.pictures import ImageInput

__all__ = ["Head", "ImageInput", "Model", "about_packed", "load", "load_packed", "save_packed"]
