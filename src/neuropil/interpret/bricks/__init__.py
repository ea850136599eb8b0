r"""Take a model apart into bricks of neurons, see what each is for, and use, merge, update or grow them one by one.

A feed-forward layer is a sum over its neurons, so any partition of them into bricks $B_1 \ldots B_E$ splits it exactly:
$$\mathrm{FFN}(x) = \sum_e \mathrm{FFN}_e(x) + b, \qquad \mathrm{FFN}_e(x) = \sum_{i \in B_e} w^{down}_i h_i(x).$$
Bricks that emerge in training are found by `partition_bricks`; `functionality` says how well each neuron tells one
function from others, `functional_bricks` tests whether the neurons of a function crowd into few bricks, and
`pruning_matrix` whether a function's neurons matter for it and for no other; `stability` compares checkpoints.

>>> import torch
>>> from torch import nn
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
>>> parts = partition_bricks(model, 8)                                 # or "coactivation", "random", ...
>>> x = torch.randn(60, 16)
>>> found = functionality(model, {"left": [x * (torch.arange(16) < 8)], "right": [x * (torch.arange(16) >= 8)]})
>>> tested = functional_bricks(found, parts, share=0.1)
>>> tested.counts["0"].sum(1)                                          # the best tenth of the neurons, over 8 bricks
tensor([6, 6])
>>> with route(model, parts, keep=0.25):                               # a quarter of the bricks is computed
...     out = model(x)
>>> extract(model, parts, {"0": [0, 3]}).model[0]                      # a smaller model of two bricks
Linear(in_features=16, out_features=16, bias=True)

The paper's four operations: *retrieve and route* (`route`, `choose`, `BrickLibrary.retrieve`), *merge* (`merge_bricks`,
`neuropil.interpret.bricks.merging`), *update* (`updating`, `edit_brick`), *grow* (`grow`). Bricks that are added after
training are `LoraBrick` and `AdapterBrick`, kept in a `BrickLibrary`. What is found goes into an atlas by
`brick_columns`, or by `neuropil bricks MODEL --atlas ATLAS`.

Source: C. Xiao, Z. Zhang, C. Song, D. Jiang, F. Yao, X. Han and others, "Configurable Foundation Models: Building LLMs
from a Modular Perspective", 2024, arXiv:2409.02877. Its text could not be read for this module. The measurements are
those of the same group's earlier work and its published code: Z. Zhang and others, "Emergent Modularity in Pre-trained
Transformers", 2023, arXiv:2305.18390, and "MoEfication", 2022, arXiv:2110.01786, which are of ungated ReLU layers. Not
given there and chosen here: everything about gated layers (weights side by side, the size of the activation in place of
the rectified one, when a neuron counts as firing), classes of equal weight in predictivity, ties broken by the distance
of the means, routing by sequence and by instruction, and the interface of customised bricks.
"""

from neuropil.interpret.bricks.ablation import (
    PruningMatrix,
    ablated,
    language_loss,
    mass_ratio,
    matched_control,
    mean_loss,
    neurons_of,
    pruning_matrix,
    random_control,
)
from neuropil.interpret.bricks.activity import Activity, observe
from neuropil.interpret.bricks.columns import brick_columns
from neuropil.interpret.bricks.custom import AdapterBrick, CustomBrick, LoraBrick, load_brick
from neuropil.interpret.bricks.functionality import Functionality, average_precision, functionality
from neuropil.interpret.bricks.library import BrickLibrary, embedding
from neuropil.interpret.bricks.merging import merge_bricks
from neuropil.interpret.bricks.partition import Partition, partition_bricks
from neuropil.interpret.bricks.routing import Cosine, MLPSelector, Oracle, choose, collect, route
from neuropil.interpret.bricks.slots import brick_outputs, extract, keep_neurons
from neuropil.interpret.bricks.testing import BrickTest, Stability, functional_bricks, stability
from neuropil.interpret.bricks.updating import edit_brick, grow, shrink, updating

__all__ = [
    "Activity",
    "AdapterBrick",
    "BrickLibrary",
    "BrickTest",
    "Cosine",
    "CustomBrick",
    "Functionality",
    "LoraBrick",
    "MLPSelector",
    "Oracle",
    "Partition",
    "PruningMatrix",
    "Stability",
    "ablated",
    "average_precision",
    "brick_columns",
    "brick_outputs",
    "choose",
    "collect",
    "edit_brick",
    "embedding",
    "extract",
    "functional_bricks",
    "functionality",
    "grow",
    "keep_neurons",
    "language_loss",
    "load_brick",
    "mass_ratio",
    "matched_control",
    "mean_loss",
    "merge_bricks",
    "neurons_of",
    "observe",
    "partition_bricks",
    "pruning_matrix",
    "random_control",
    "route",
    "shrink",
    "stability",
    "updating",
]
