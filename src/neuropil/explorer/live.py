"""The model behind the pages: loaded when first needed, in the background, run by one visitor at a time."""

import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from neuropil.errors import NeuropilError
from neuropil.neurons import Neuron, capture, clamp

LONGEST_TEXT = 8_000  # characters of a text whose firing is shown, or of a prompt
MOST_TOKENS = 1_024  # tokens of the same
MOST_NEW_TOKENS = 400


class NotReady(NeuropilError):  # noqa: N818
    """The model is still loading, or cannot be had; the message says which and what to do."""


@dataclass(frozen=True)
class Status:
    state: str  # "idle" | "loading" | "ready" | "failed"
    message: str
    seconds: float = 0.0
    warning: str = ""


@dataclass(frozen=True)
class Firing:
    """What one neuron did on one text: a value a token."""

    tokens: list[str]
    values: list[float]
    site: str


@dataclass
class Run:
    """What to generate."""

    prompt: str
    clamps: Mapping[str, float]
    where: str = "hidden"
    chat: bool = False
    tokens: int = 60
    temperature: float = 0.0
    seed: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


class Live:
    """A model that loads itself in the background on first need.

    Args:
        source: what `neuropil.models.load` takes, a loaded `Model`, or None where there is none.
        fingerprint: that of the model the atlas was made of, to notice another one.
        why: what to say where there is no source.
    """

    def __init__(self, source: Any, fingerprint: str = "", why: str = "there is no model") -> None:
        self._source, self._fingerprint, self._why = source, fingerprint, why
        self._lock = threading.Lock()  # one forward pass at a time: hooks are the model's, not a caller's
        self._starting = threading.Lock()
        self._model: Any = None
        self._module: Any = None
        self._status = Status("idle", "not loaded yet; it loads when first needed")
        self._since = 0.0

    @property
    def status(self) -> Status:
        s = self._status
        return Status(s.state, s.message, time.monotonic() - self._since) if s.state == "loading" else s

    def start(self) -> Status:
        """Begin loading unless that has been done; returns at once. A failed load may be tried again."""
        with self._starting:
            if self._status.state in {"idle", "failed"}:
                self._since = time.monotonic()
                self._status = Status("loading", "loading the model")
                threading.Thread(target=self._load, daemon=True, name="neuropil-explorer-model").start()
        return self.status

    def light(self) -> Any:
        """The model's weights without its module (they are read site by site); None if it cannot be had."""
        if self._model is None and self._status.state in {"idle", "ready"}:
            try:
                self._open()
            except Exception as error:
                self._status = Status("failed", _told(error))
        return self._model

    @property
    def tokenizer(self) -> Any:
        return getattr(self._model, "tokenizer", None)

    @property
    def chats(self) -> bool:
        """Whether prompts can be put as a turn of a chat; known once the model is loaded."""
        return self._module is not None and bool(getattr(self.tokenizer, "chat_template", None))

    def _open(self) -> None:
        if self._source is None:
            raise NotReady(self._why)
        if hasattr(self._source, "module") and hasattr(self._source, "rows"):
            self._model = self._source
        else:
            from neuropil.models import load

            self._model = load(self._source)

    def _load(self) -> None:
        try:
            if self._model is None:
                self._open()
            if self.tokenizer is None:
                raise NotReady(f"{self._model.name} has no tokenizer, so text cannot be put through it")
            module = self._model.module()
            self._model.tokenizer  # noqa: B018 - loaded here rather than in the first request
        except Exception as error:  # whatever it is, the visitor must see it and the rest must go on
            self._status = Status("failed", _told(error))
            return
        self._module = module
        other = self._fingerprint and self._model.fingerprint != self._fingerprint
        self._status = Status(
            "ready",
            f"{self._model.name} is loaded",
            time.monotonic() - self._since,
            "This is not the model the atlas was made of (its fingerprint differs)." if other else "",
        )

    def _ready(self) -> Any:
        status = self.start()
        if status.state != "ready":
            raise NotReady(status.message)
        return self._module

    def fires(self, address: str, text: str) -> Firing:
        """The activation of a neuron at every token of a text. Raises NotReady, UnknownNeuron."""
        module = self._ready()
        neuron = Neuron.parse(address, self._model.sites)
        site = next(s for s in self._model.sites if s.name == neuron.site)
        ids = self.tokenizer(text[:LONGEST_TEXT], return_tensors="pt")["input_ids"][:, :MOST_TOKENS]
        if ids.shape[1] == 0:
            return Firing([], [], site.name)
        with self._lock, torch.inference_mode(), capture(module, [site]) as seen:
            module(input_ids=ids)
        values = seen.get(site.name)
        if values is None or values.reshape(-1, site.width).shape[0] != ids.shape[1]:
            raise NotReady(f"{site.name} does not see every token of a text (it is a {site.kind} layer)")
        held = values.reshape(-1, site.width)[:, neuron.index].float().tolist()
        return Firing([self.tokenizer.decode([i]) for i in ids[0].tolist()], held, site.name)

    def generate(self, run: Run) -> Generator[dict[str, Any], None, None]:
        """Generate without and with the clamps, in step. Yields events: status, token, done, error.

        The generator may be closed at any point; the model is then free and as it was.
        """
        yield from self._await_model(run)
        if run.stop.is_set() or self._status.state != "ready":
            return
        waited = False
        while not self._lock.acquire(timeout=0.3):
            if run.stop.is_set():
                return
            if not waited:
                yield {"event": "status", "message": "waiting: another generation is running"}
                waited = True
        try:
            yield from self._race(run)
        except (NeuropilError, ValueError, RuntimeError, IndexError) as error:
            yield {"event": "error", "message": _told(error)}
        finally:
            self._lock.release()

    def _await_model(self, run: Run) -> Iterator[dict[str, Any]]:
        while (status := self.start() if self._status.state == "idle" else self.status).state == "loading":
            yield {"event": "status", "message": f"loading the model ({status.seconds:.0f} s)"}
            if run.stop.wait(0.25):
                return
        if status.state == "failed":
            yield {"event": "error", "message": status.message}

    def _prompt(self, run: Run) -> torch.Tensor:
        text = run.prompt[:LONGEST_TEXT]
        if run.chat and self.chats:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def _race(self, run: Run) -> Iterator[dict[str, Any]]:
        for address in run.clamps:  # an unknown neuron is refused before anything runs
            Neuron.parse(address, self._model.sites)
        if not getattr(self._module, "can_generate", lambda: True)():
            yield {"event": "error", "message": f"{self._model.name} does not generate text"}
            return
        ids = self._prompt(run)[:, -MOST_TOKENS:]
        if ids.shape[1] == 0:
            yield {"event": "error", "message": "the prompt is empty; type something to continue"}
            return
        yield {"event": "status", "message": "generating"}
        sides = [_Side("plain", self._module, self.tokenizer, {}, run, ids)]
        if run.clamps:
            sides.append(_Side("clamped", self._module, self.tokenizer, run.clamps, run, ids))
        for _ in range(min(run.tokens, MOST_NEW_TOKENS)):
            for side in [s for s in sides if not s.ended]:
                if run.stop.is_set():
                    return
                yield side.step()
            if all(s.ended for s in sides):
                break
        yield {"event": "done", "seconds": round(sum(s.seconds for s in sides), 2)}


class _Side:
    """One of the two generations, a token at a time.

    The hooks and the inference mode are set anew for each token: a generator's steps may run in
    different threads, and between two steps the model must be as it was.
    """

    def __init__(
        self, name: str, module: Any, tokenizer: Any, clamps: Mapping[str, float], run: Run, ids: torch.Tensor
    ) -> None:
        self.name, self.module, self.tokenizer = name, module, tokenizer
        self.clamps, self.run, self.next = clamps, run, ids
        self.cache: Any = None
        self.made: list[int] = []
        self.text = ""
        self.ended, self.seconds = False, 0.0
        self.random = torch.Generator().manual_seed(run.seed)
        ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.ends = set(ends) if isinstance(ends, list) else {ends}

    def step(self) -> dict[str, Any]:
        began = time.perf_counter()
        with torch.inference_mode(), clamp(self.module, self.clamps, where=self.run.where):
            out = self.module(input_ids=self.next, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        token, chance = self._pick(out.logits[0, -1].float())
        self.seconds += time.perf_counter() - began
        self.next = torch.tensor([[token]])
        self.made.append(token)
        if token in self.ends:
            self.ended = True
            return {"event": "token", "side": self.name, "text": "", "end": True, "p": chance, "id": token}
        whole = self.tokenizer.decode(self.made, skip_special_tokens=True)
        # A letter of several bytes may arrive in several tokens; it is held back until it is whole.
        new = "" if whole.endswith("\ufffd") else whole[len(self.text) :]
        self.text += new
        return {"event": "token", "side": self.name, "text": new, "end": False, "p": chance, "id": token}

    def _pick(self, logits: torch.Tensor) -> tuple[int, float]:
        chances = logits.softmax(-1)
        if self.run.temperature > 0:
            warm = (logits / self.run.temperature).softmax(-1)
            token = int(torch.multinomial(warm, 1, generator=self.random))
        else:
            token = int(logits.argmax())
        return token, round(float(chances[token]), 4)


def _told(error: BaseException) -> str:
    """An error in the words of its raiser, which for this library's own errors is enough."""
    return str(error) if isinstance(error, NeuropilError) else f"{type(error).__name__}: {error}"
