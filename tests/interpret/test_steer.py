"""Steering: the closed form of a last-layer clamp, a clamp a row, the finder."""

import numpy as np
import pytest
import torch
from tiny_models import llama, tiny
from torch import nn

from neuropil.errors import NeuropilError, UnknownNeuron
from neuropil.interpret import steer

PROMPT = "babado babaki babalu bameno"


def test_one_clamp_a_row_equals_single_runs() -> None:
    model = tiny()
    clamps = [{}, {"0:3": 400.0}, {"1:7": -200.0}, {"0:3": -100.0, "1:0": 200.0}]
    together = steer.log_probabilities(model, PROMPT, clamps)
    for row, held in enumerate(clamps):
        torch.testing.assert_close(
            together[row], steer.log_probabilities(model, PROMPT, [held])[0], atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(together[0], together[1])


def test_last_layer_clamp_has_its_closed_form() -> None:
    """logits = W_U (g * (x + dv W_down[:, n]) / rms), dv = silu(gate) (v - up): the sheet's invariant 7."""
    net = llama()
    model = tiny()
    layer, n, value = net.model.layers[1], 11, 3.0
    seen: dict[str, torch.Tensor] = {}
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    layer.register_forward_hook(lambda _, __, out: seen.update(y=out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        net(**model.tokenizer(PROMPT, return_tensors="pt"))
        x, y = seen["x"][0, -1], seen["y"].reshape(-1, 32)[-1]
        dv = nn.functional.silu(layer.mlp.gate_proj(x)[n]) * (value - layer.mlp.up_proj(x)[n])
        moved = y + dv * layer.mlp.down_proj.weight[:, n]
        logits = net.lm_head(net.model.norm(moved))
    measured = steer.log_probabilities(model, PROMPT, [{f"1:{n}": value}])[0]
    torch.testing.assert_close(measured, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_sweep_is_zero_for_a_neuron_that_writes_nothing() -> None:
    model = tiny()
    with torch.no_grad():
        model.module().model.layers[0].mlp.down_proj.weight[:, 5] = 0
    found = steer.sweep(model, "0:5", [3, 4], [PROMPT], [-50.0, 50.0])
    assert torch.equal(found.change, torch.zeros(2, 1))
    assert found.divergence.abs().max() == 0


def test_sweep_and_its_divergence() -> None:
    found = steer.sweep(tiny(), "1:5", [3], [PROMPT, PROMPT[:10]], [-20.0, 0.0, 20.0])
    assert found.change.shape == found.divergence.shape == (3, 2)
    assert (found.divergence >= -1e-6).all()
    assert found.change.abs().max() > 0


def test_a_planted_neuron_is_found_and_turns_its_token_up() -> None:
    model = tiny()
    token = 17
    with torch.no_grad():
        mlp, head = model.module().model.layers[1].mlp, model.module().lm_head.weight
        direction = head[token] / head[token].norm()
        mlp.up_proj.weight[9] = -direction  # reads it negatively ...
        mlp.gate_proj.weight[9] = direction
        mlp.down_proj.weight[:, 9] = direction  # ... and writes it
    word = model.tokenizer.decode([token])
    first = steer.find(model, word).slice(0, 1).to_pylist()[0]
    assert first["neuron"] == "1:9"
    assert first["sign"] == 1
    np.testing.assert_allclose([first["cos_up"], first["cos_gate"], first["cos_down"]], [-1, 1, 1], atol=1e-5)
    hidden = steer.sweep(model, "1:9", word, [PROMPT], [-30.0, 30.0], where="hidden").change[:, 0]
    assert hidden[1] > 0 > hidden[0]


def test_rules_rank_as_they_say() -> None:
    triple = {
        "up": np.array([[0.9], [-0.8], [0.5]]),
        "gate": np.array([[-0.2], [0.1], [0.3]]),
        "down": np.array([[0.9], [0.5], [0.1]]),
        "z": np.array([[3.0], [-9.0], [1.0]]),
    }
    best = {rule: int(steer.score(triple, rule).argmax()) for rule in steer.RULES}
    assert best == {"triple": 1, "abs_up": 0, "up": 0, "z": 1}
    assert steer.score(triple, "z", hub=np.array([False, True, False])).argmax() == 0
    with pytest.raises(ValueError, match="expected one of"):
        steer.score(triple, "best")


def test_words_and_neurons_that_are_not_there() -> None:
    model = tiny()
    with pytest.raises(UnknownNeuron, match="0 to 47"):
        steer.sweep(model, "0:48", [1], [PROMPT], [1.0])
    with pytest.raises(NeuropilError, match="no single token"):
        steer.sweep(model, "0:4", "xylophone", [PROMPT], [1.0])
    with pytest.raises(NeuropilError, match="tokens to this model"):
        steer.token_of(model, "bababa bababa")
