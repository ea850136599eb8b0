"""The model behind the pages: what it shows is what the model does, and it is left as it was."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from neuropil.explorer.live import Live, NotReady, Run
from neuropil.models import Model
from neuropil.neurons import capture, clamp

PROMPT = "The dog chased the"


@pytest.fixture(scope="module")
def live(model: Model) -> Live:
    made = Live(model, model.fingerprint)
    settle(made)
    return made


def settle(live: Live) -> str:
    live.start()
    deadline = time.monotonic() + 60
    while live.status.state == "loading":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return live.status.state


def tokens(events: list[dict[str, Any]], side: str) -> list[int]:
    return [e["id"] for e in events if e["event"] == "token" and e["side"] == side]


def reference(model: Model, ids: torch.Tensor, clamps: dict[str, float], where: str, new: int) -> list[int]:
    with torch.inference_mode(), clamp(model.module(), clamps, where=where):
        out = model.module().generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("where", ["hidden", "up"])
def test_both_sides_are_what_generate_gives(live: Live, model: Model, where: str) -> None:
    clamps = {"1:3": 40.0, "2:5": -40.0}
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    events = list(live.generate(Run(PROMPT, clamps, where=where, tokens=12)))
    assert events[-1]["event"] == "done"
    plain, clamped = tokens(events, "plain"), tokens(events, "clamped")
    assert plain == reference(model, ids, {}, where, 12)
    assert clamped == reference(model, ids, clamps, where, 12)
    assert plain != clamped
    text = "".join(e["text"] for e in events if e["event"] == "token" and e["side"] == "plain")
    assert model.tokenizer.decode(plain, skip_special_tokens=True).startswith(text)


def test_the_model_is_as_before(live: Live, model: Model) -> None:
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        before = model.module()(ids).logits
    run = live.generate(Run(PROMPT, {"0:0": 50.0}, tokens=30))
    for event in run:
        if event["event"] == "token" and event["side"] == "clamped":
            break
    run.close()  # as when the visitor goes away between two tokens
    with torch.inference_mode():
        assert torch.equal(model.module()(ids).logits, before)
    assert list(live.generate(Run(PROMPT, {}, tokens=1)))[-1]["event"] == "done"  # and it is free


def test_a_stopped_run_ends(live: Live) -> None:
    run = Run(PROMPT, {}, tokens=400)
    seen = []
    for event in live.generate(run):
        seen.append(event)
        if len(tokens(seen, "plain")) == 3:
            run.stop.set()
    assert len(tokens(seen, "plain")) == 3
    assert seen[-1]["event"] != "done"


def test_one_at_a_time(live: Live) -> None:
    first = live.generate(Run(PROMPT, {}, tokens=5))
    while next(first)["event"] != "token":
        pass
    waiting: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: waiting.extend(live.generate(Run(PROMPT, {}, tokens=2))))
    thread.start()
    time.sleep(0.6)
    assert [e["event"] for e in waiting] == ["status"]
    assert "waiting" in waiting[0]["message"]
    list(first)
    thread.join(20)
    assert waiting[-1]["event"] == "done"


def test_the_seed_decides_what_is_drawn(live: Live) -> None:
    def draw(seed: int) -> list[int]:
        return tokens(list(live.generate(Run(PROMPT, {}, tokens=10, temperature=1.5, seed=seed))), "plain")

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) > 1


def test_a_chat_goes_through_the_template(live: Live, model: Model) -> None:
    assert live.chats
    text = f"[user] {PROMPT}\n[assistant]"
    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    events = list(live.generate(Run(PROMPT, {}, chat=True, tokens=6)))
    assert tokens(events, "plain") == reference(model, ids, {}, "hidden", 6)


@pytest.mark.parametrize(("run", "said"), [
    (Run("x", {"99:0": 1.0}), "no site '99'"), (Run("", {}), "the prompt is empty"),
])  # fmt: skip
def test_what_cannot_be_run_is_told(live: Live, run: Run, said: str) -> None:
    [*_, last] = live.generate(run)
    assert last["event"] == "error"
    assert said in last["message"]


def test_firing_is_the_captured_activation(live: Live, model: Model) -> None:
    text = "In France they say “dog” — é 日"
    firing = live.fires("1:7", text)
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode(), capture(model.module()) as seen:
        model.module()(ids)
    assert firing.values == pytest.approx(seen[model.sites[1].name][0, :, 7].tolist(), abs=1e-6)
    assert len(firing.tokens) == ids.shape[1]
    assert live.fires("1:7", "").tokens == []


def test_a_model_that_is_not_there() -> None:
    live = Live("/nowhere/to/be/found.gguf")
    assert settle(live) == "failed"
    assert "no such file" in live.status.message
    events = list(live.generate(Run("x", {})))
    assert events[-1]["event"] == "error"
    assert "no such file" in events[-1]["message"]
    with pytest.raises(NotReady):
        live.fires("0:0", "x")
    assert live.light() is None


def test_a_model_without_a_tokenizer(model: Model) -> None:
    from neuropil.models import load

    live = Live(load(model.module()))
    assert settle(live) == "failed"
    assert "no tokenizer" in live.status.message


def test_another_model_is_noticed(model: Model, model_folder: Path) -> None:
    live = Live(str(model_folder), "0" * 32)
    assert settle(live) == "ready"
    assert "not the model" in live.status.warning
