"""Walking through a model layer by layer, and choosing parameters that keep each layer's output."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from neuropil.compress.reconstruction import (
    Call,
    ReconstructionError,
    Seen,
    mean_error,
    minimise,
    output_error,
    run_order,
    walk,
)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))


def batches(count: int = 3, rows: int = 16) -> list[Tensor]:
    return [torch.randn(rows, 6, generator=torch.Generator().manual_seed(i)) for i in range(count)]


class Backwards(nn.Module):
    """Its modules run in another order than they are named, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.twice = nn.Linear(6, 2), nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last(self.twice(self.twice(x) * scale))


def test_inputs_and_outputs_are_those_of_the_layer() -> None:
    model, data = net().train(), batches()
    for seen in walk(model, ["3", "0"], data):
        layer = model.get_submodule(seen.name)
        assert len(seen.calls) == 3
        for call, x in zip(seen.calls, data, strict=True):
            wanted = x if seen.name == "0" else model[0](x).relu()
            torch.testing.assert_close(call.args[0], wanted)
            torch.testing.assert_close(call.output, layer(wanted), rtol=0, atol=0)
            assert not call.output.requires_grad
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_order_is_that_of_running() -> None:
    model, x = Backwards(), torch.randn(4, 6)
    assert run_order(model, ["last", "twice"], (x, torch.tensor(2.0))) == [("twice", 2), ("last", 1)]
    first, last = walk(model, ["last", "twice"], [{"x": x, "scale": torch.tensor(2.0)}])
    assert (first.name, len(first.calls), last.name) == ("twice", 2, "last")
    torch.testing.assert_close(first.calls[1].args[0], 2 * model.twice(x))


def test_a_compressed_prefix_gives_the_inputs_and_the_plain_model_the_outputs() -> None:
    model = net().eval()
    other = copy.deepcopy(model)
    for seen in walk(model, ["0", "3"], batches(), inputs_from=other):
        call, x = seen.calls[0], batches()[0]
        torch.testing.assert_close(call.args[0], x if seen.name == "0" else other[0](x).relu())
        torch.testing.assert_close(call.output, model[:4](x) if seen.name == "3" else model[0](x))
        other.get_submodule(seen.name).weight.data.mul_(0.5)  # a change now is seen by what comes after


def test_a_transformer_block_can_be_called_again() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes))
    ids = [torch.randint(50, (2, 7)), torch.randint(50, (2, 5))]
    names = ["model.layers.0", "model.layers.1", "lm_head"]
    for seen in walk(model, names, [{"input_ids": each} for each in ids]):
        block = model.get_submodule(seen.name)
        for _ in range(2):
            assert output_error(block, seen) < 1e-9
        half = seen.calls[0].part(torch.tensor([1]))
        out = block(*half.args, **half.kwargs)
        torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, half.output)
    assert model.config.use_cache


def test_least_squares_is_found() -> None:
    """With a linear layer and enough steps, Adam comes to the closed form."""
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = x @ torch.randn(4, 3) + 0.1 * torch.randn(256, 3)
    seen = Seen("layer", [Call((x,), {}, y)])
    layer = nn.Linear(4, 3, bias=False)
    losses = minimise(layer, [layer.weight], seen, steps=1500, batch=256, lr=0.01)
    torch.testing.assert_close(layer.weight.T, torch.linalg.lstsq(x, y).solution, rtol=0, atol=1e-3)
    assert losses[-1] < losses[0]
    assert output_error(layer, seen) == pytest.approx(losses[-1], rel=1e-4)


def test_only_the_given_parameters_move() -> None:
    seen, layer = next(walk(net(), ["0"], batches())), nn.Linear(6, 8)
    outside = torch.get_rng_state()
    before = copy.deepcopy(layer.state_dict())
    penalties: list[int] = []

    def penalty(step: int) -> Tensor:
        penalties.append(step)
        return layer.bias.square().sum()

    clamped: list[int] = []
    minimise(
        layer, [{"params": [layer.bias], "lr": 0.1}], seen, steps=5, penalty=penalty, after=lambda: clamped.append(1)
    )
    assert torch.equal(layer.weight, before["weight"])
    assert not torch.equal(layer.bias, before["bias"])
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert penalties == [0, 1, 2, 3, 4]
    assert len(clamped) == 5
    assert torch.equal(torch.get_rng_state(), outside)


def test_samples_are_even_over_examples() -> None:
    calls = [Call((torch.full((n, 1), float(n)),), {}, torch.full((n, 1), float(n))) for n in (10, 30)]
    seen, generator = Seen("x", calls), torch.Generator().manual_seed(0)
    drawn = [seen.sample(4, generator) for _ in range(400)]
    assert all(call.rows == 4 and torch.equal(call.args[0], call.output) for call in drawn)
    share = sum(float(call.output[0]) == 30 for call in drawn) / 400
    assert 0.68 < share < 0.82
    assert seen.sample(64, generator) in calls


def test_errors_are_summed_over_features() -> None:
    image = torch.ones(2, 3, 4, 4)
    assert mean_error(image, torch.zeros_like(image)) == 3
    tokens = torch.ones(2, 5, 7)
    assert mean_error(tokens, torch.zeros_like(tokens)) == 7
    assert mean_error(torch.ones(4, 2), torch.zeros(4, 2)) == 2


def test_what_cannot_be_walked_is_refused() -> None:
    model = net()
    with pytest.raises(ReconstructionError, match="empty"):
        next(walk(model, ["0"], []))
    with pytest.raises(ReconstructionError, match="no module"):
        next(walk(model, ["9"], batches()))
    with pytest.raises(ReconstructionError, match="did not run"):
        next(walk(nn.Sequential(model, _Idle()), ["1.spare"], batches()))
    seen = next(walk(model, ["0"], batches()))
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ReconstructionError, match="loss is nan"):
        minimise(layer, [layer.bias], seen)


class _Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x
