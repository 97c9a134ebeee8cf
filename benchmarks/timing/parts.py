"""Where the time of an answer goes: an instrumented pass of its own, so that the timings of ratios are not disturbed."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lmms_smoothguard.aggregation import verdict
from lmms_smoothguard.defenses import consensus
from lmms_smoothguard.noise import NoiseSource
from timing.paired import median, synchronize

PARTS = ("noise", "vision", "prefill", "decode", "aggregation", "rest")
"""noise: digests and copies; vision: the tower and the projector; prefill and decode: the language model and its head
with more than one new position, and with one; aggregation: `aggregate`, embedder included, or at token level `agree`;
rest: everything else (generate's own loop, batching, decoding of texts)."""


class Clock:
    """Seconds spent in each part, `rest` excepted."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.phase = "prefill"
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Nothing was spent yet."""
        self.seconds = dict.fromkeys(PARTS[:-1], 0.0)

    def timed(self, function: Callable[..., Any], part: Callable[..., str]) -> Callable[..., Any]:
        """`function`, its time noted under `part(*args, **kwargs)`; none of the timed functions calls another."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            name = part(*args, **kwargs)
            synchronize(self._device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self._device)
                self.seconds[name] += time.perf_counter() - start

        return call

    def shares(self, whole: float) -> dict[str, float]:
        """The share of every part in `whole` seconds, with the rest; they sum to 1."""
        shares = {part: seconds / whole for part, seconds in self.seconds.items()}
        return {**shares, "rest": 1 - sum(shares.values())}

    def phase_of(self, *args: Any, **kwargs: Any) -> str:
        """Whether a call of the language model fills the cache or goes on from it."""
        values = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
        if values is None:
            values = next(value for value in args if isinstance(value, torch.Tensor))
        self.phase = "decode" if values.shape[1] == 1 else "prefill"
        return self.phase


@contextlib.contextmanager
def instrumented(model: Any, device: str) -> Iterator[Clock]:
    """Wraps the parts of a LLaVA and of the defence; everything is put back afterwards."""
    clock = Clock(device)
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, part: Callable[..., str]) -> None:
            original = getattr(owner, name)
            own = owner.__dict__.get(name)
            setattr(owner, name, clock.timed(original, part))
            stack.callback(
                functools.partial(setattr, owner, name, own) if own else functools.partial(delattr, owner, name)
            )

        for name in ("__init__", "copy"):
            wrap(NoiseSource, name, lambda *_, **__: "noise")
        for module in (model.model.vision_tower, model.model.multi_modal_projector):
            wrap(module, "forward", lambda *_, **__: "vision")
        wrap(model.model.language_model, "forward", clock.phase_of)
        wrap(model.lm_head, "forward", lambda *_, **__: clock.phase)
        for function in (verdict.aggregate, consensus.agree):
            for module in [m for key, m in sys.modules.items() if key.startswith("lmms_smoothguard")]:
                if getattr(module, function.__name__, None) is function:  # whoever imported it by name
                    wrap(module, function.__name__, lambda *_, **__: "aggregation")
        yield clock


def measure(model: Any, device: str, rounds: int, answer: Callable[[int], Any]) -> dict[str, Any]:
    """The median share of every part in the time of `answer(0)` ... `answer(rounds - 1)`, after one call as warm-up.

    `own`: noise and aggregation together, what the defence itself computes.
    """
    answer(0)
    found: list[dict[str, float]] = []
    with instrumented(model, device) as clock:
        for number in range(rounds):
            clock.reset()
            synchronize(device)
            start = time.perf_counter()
            answer(number)
            synchronize(device)
            shares = clock.shares(time.perf_counter() - start)
            found.append({**shares, "own": shares["noise"] + shares["aggregation"]})
    return {"rounds": rounds, "shares": {part: median([one[part] for one in found]).to_dict() for part in found[0]}}
