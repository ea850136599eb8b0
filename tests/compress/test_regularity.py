"""The pattern of sparse matrices, against counting by hand."""

from itertools import groupby

import pytest
import torch
from torch import nn

from neuropil.compress import prune_magnitude
from neuropil.compress.regularity import BLOCK, packed_bytes, pattern, regularity, regularity_by_layer


def gamma_code(n: int) -> str:
    return "0" * (n.bit_length() - 1) + f"{n:b}"


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 8), (20, 37)])
def test_counts(density: float, shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density
    found = pattern(mask)
    runs, code = 0, ""
    for row in mask.tolist():
        groups = [(bit, len(list(group))) for bit, group in groupby(row)]
        runs += sum(bit for bit, _ in groups)
        if groups[0][0]:
            groups.insert(0, (False, 0))
        groups[0] = (False, groups[0][1] + 1)
        code += "".join(gamma_code(length) for _, length in groups)
    assert (found.runs, found.index_bits) == (runs, len(code))
    assert found.nonzero == int(mask.sum())
    assert found.weights == mask.numel()
    assert (found.rows, found.columns) == shape
    assert found.empty_rows == sum(not any(row) for row in mask.tolist())
    assert found.empty_columns == sum(not any(column) for column in mask.T.tolist())
    parts = [row[i : i + BLOCK] for row in mask.tolist() for i in range(0, shape[1], BLOCK)]
    assert (found.blocks, found.empty_blocks) == (len(parts), sum(not any(part) for part in parts))


def test_layers_add_up_and_are_seen_neurons_first() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(5, 2))
    with torch.no_grad():
        net[1].weight[:, 1] = 0
    layers = regularity_by_layer(net)
    assert layers["0"].rows == 4
    assert layers["0"].columns == 18
    assert (layers["1"].rows, layers["1"].empty_rows) == (3, 1)
    whole = regularity(net)
    assert whole.weights == sum(layer.weights for layer in layers.values())
    assert whole.sparsity == pytest.approx(16 / whole.weights)


def test_an_empty_model_and_a_model_of_zeros() -> None:
    with pytest.raises(ValueError, match="no linear map"):
        regularity(nn.Sequential(nn.ReLU()))
    net = nn.Sequential(nn.Linear(4, 4))
    nn.init.zeros_(net[0].weight)
    found = regularity(net)
    assert found.sparsity == 1
    assert found.run != found.run


def test_packed_bytes_fall_with_the_weights() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    assert packed_bytes(prune_magnitude(net, 0.9).model) < packed_bytes(prune_magnitude(net, 0.5).model)
