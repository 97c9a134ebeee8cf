"""Smoothing in force: for the calls of one thread, while a `with` lasts.

The tower's `forward` is wrapped when the first thread asks for smoothing and put back when the last one is done. Calls of
threads that did not ask go straight through, so nobody is defended, or left undefended, by a neighbour.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from lmms_smoothguard.boosting.booster import load_booster
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.noise import SeededNoise
from lmms_smoothguard.smoothing.smoother import Noise, Smoother
from lmms_smoothguard.smoothing.towers import find_tower

_lock = threading.RLock()
_thread = threading.local()
_wrapped: dict[int, tuple[Any, Any, int]] = {}
"""id of a module -> (the module, what its `forward` attribute was, or _NOTHING, and how many smoothings are in force)."""
_NOTHING = object()


@contextlib.contextmanager
def smoothed(
    model: Any, config: FeatureSmoothingConfig, image_processor: Any = None, noise: Noise | None = None
) -> Iterator[Smoother]:
    """Inside, this thread's calls of the model see its pictures through the smoothed vision tower.

    Works for everything that calls the tower: `generate`, `forward`, `get_image_features`, and the zero-shot classification and
    retrieval of bare CLIP and SigLIP. noise: other draws than the seeded ones of the config. Raises UndefendableError for a
    model without a vision tower, ConfigError for a booster that is not this model's.
    """
    smoother = make_smoother(model, config, image_processor, noise)
    tower = smoother.tower
    with _in_force(tower.module, smoother, _forward), contextlib.ExitStack() as stack:
        if tower.dual and tower.tail is not None:
            stack.enter_context(_in_force(tower.tail, smoother, _project))
        yield smoother


def make_smoother(
    model: Any, config: FeatureSmoothingConfig, image_processor: Any = None, noise: Noise | None = None
) -> Smoother:
    """What `smoothed` puts in force, by itself."""
    tower = find_tower(model)
    with _lock:
        known = _wrapped.get(id(tower.module))
        original = tower.module.forward if known is None else tower.module.forward.__wrapped__
    booster = None
    if config.booster is not None:
        booster = load_booster(config.booster, tower, mapper=config.mapper)
        booster.check_sigma(config.sigma)
    return Smoother(
        tower,
        original,
        pixel_statistics(model, image_processor),
        noise or SeededNoise(config.sigma, config.seed),
        config.num_samples,
        config.sigma,
        booster,
        config.max_copies_per_batch,
    )


def _forward(smoother: Smoother, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with _without(smoother):  # a tower that calls itself, or is called for single passes, is not smoothed twice
        return smoother(*args, **kwargs)


def _project(smoother: Smoother, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The projection of a dual encoder: the smoothed embedding, where it is given what the smoothed tower gave."""
    if smoother.embedding is None or not args or args[0] is not smoother.embedding[0]:
        raise UndefendableError(
            "the image projection was called with something other than the smoothed tower's output; expected the model's own "
            "get_image_features or forward"
        )
    return smoother.embedding[1]


# -- whose calls are smoothed ------------------------------------------------------------------------------------------


def _active() -> list[tuple[Any, Smoother, Callable[..., Any]]]:
    """What this thread asked for, the latest last: (module, smoother, how it answers)."""
    if not hasattr(_thread, "active"):
        _thread.active = []
    return _thread.active  # type: ignore[no-any-return]


@contextlib.contextmanager
def _without(smoother: Smoother) -> Iterator[None]:
    before, _thread.active = _active(), [entry for entry in _active() if entry[1] is not smoother]
    try:
        yield
    finally:
        _thread.active = before


@contextlib.contextmanager
def _in_force(module: Any, smoother: Smoother, answer: Callable[..., Any]) -> Iterator[None]:
    _wrap(module)
    entry = (module, smoother, answer)
    _thread.active = [*_active(), entry]
    try:
        yield
    finally:
        _thread.active = [one for one in _active() if one is not entry]
        _unwrap(module)


def _wrap(module: Any) -> None:
    with _lock:
        if id(module) in _wrapped:
            kept, before, count = _wrapped[id(module)]
            _wrapped[id(module)] = (kept, before, count + 1)
            return
        original = module.forward
        _wrapped[id(module)] = (module, module.__dict__.get("forward", _NOTHING), 1)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for owner, smoother, answer in reversed(_active()):
                if owner is module:
                    return answer(smoother, original, args, kwargs)
            return original(*args, **kwargs)

        forward.__wrapped__ = original  # type: ignore[attr-defined]  # and with it the signature
        module.forward = forward


def _unwrap(module: Any) -> None:
    with _lock:
        kept, before, count = _wrapped[id(module)]
        if count > 1:
            _wrapped[id(module)] = (kept, before, count - 1)
            return
        del _wrapped[id(module)]
        if before is _NOTHING:
            del module.forward
        else:
            module.forward = before
