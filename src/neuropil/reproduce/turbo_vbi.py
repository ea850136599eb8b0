from __future__ import annotations
from collections.abc import Callable
from functools import partial
from typing import Any
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune as torch_prune
from neuropil.compress.regularity import regularity, regularity_by_layer
from neuropil.compress.sparse import prune_magnitude
from neuropil.compress.support import BernoulliPrior, HMMPrior
from neuropil.compress.turbo_vbi import TurboVBI
from neuropil.compress.variational_dropout import VariationalDropout
from neuropil.data import digits, fashion_mnist
BATCH = 128
MAGNITUDE, VD, GROUP = "magnitude", "sparse variational dropout", "group variational dropout"
IID, ROWS, GRID = "Turbo-VBI, independent", "Turbo-VBI, chains", "Turbo-VBI, chains both ways"
Split = tuple[Tensor, Tensor]

def network(inputs, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))

def one_epoch(model, optimizer, data, seed, schedule=None):
    model.train()
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    for batch in order.split(BATCH)[: len(order) // BATCH]:
        optimizer.zero_grad()
        loss = cross_entropy(model(data[0][batch]), data[1][batch])
        if schedule is not None:
            loss = loss + schedule.kl()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    model.eval()

@torch.no_grad()
def accuracy(model, data):
    return 100 * float((model(data[0]).argmax(1) == data[1]).float().mean())
