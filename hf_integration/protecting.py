"""Processors that carry sounds along beside their features, so that `generate` can put noise on the waveform."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_integration.shortness import PROCESSING, noting_short_sounds
from lmms_smoothguard.errors import ConfigError, UndefendableError

log = logging.getLogger(__name__)

_PARTS = ("feature_extractor", "audio_processor")
_MAKERS = ("__call__", "apply_chat_template", "apply_transcription_request")
"""What a user calls to have sounds processed."""
_PLAIN = "__smoothguard_unprotected__"
"""An attribute of protected classes: what they were before."""
_thread = threading.local()


def protect(processor: Any) -> Any:
    """Makes a processor carry the sounds it is given beside the features that it makes of them, and returns it.

    What it gives then has an entry `smoothguard_clips`, which a defended `generate` needs and one without the override refuses; with
    no defence asked for it is dropped. The processor stays what it is in all else, by its class too; protecting it again changes
    nothing. Raises ConfigError for a processor without a feature extractor for sounds.
    """
    extractor = extractor_of(processor)
    if extractor is None:
        raise ConfigError(
            f"{type(processor).__name__} has no feature extractor for sounds ({' or '.join(_PARTS)}); expected a model's whole "
            "processor. One for pictures alone needs no protection"
        )
    for part, protected in ((extractor, _recording), (processor, _carrying)):
        if not hasattr(type(part), _PLAIN):
            part.__class__ = protected(type(part))  # type: ignore[arg-type]
    return processor


def unprotect(processor: Any) -> None:
    """Makes a processor, and its extractor, what they were."""
    for part in (extractor_of(processor), processor):
        part.__class__ = getattr(type(part), _PLAIN, type(part))


def is_protected(processor: Any) -> bool:
    """Whether it carries sounds along."""
    return hasattr(type(processor), _PLAIN)


def hears(processor: Any) -> bool:
    """Whether it is a processor with a feature extractor for sounds: one that can be protected."""
    return extractor_of(processor) is not None


def extractor_of(processor: Any) -> Any:
    """The part that makes features of sounds; None where there is none."""
    found = (getattr(processor, name, None) for name in _PARTS)
    return next((part for part in found if hasattr(part, "sampling_rate") and callable(part)), None)


# -- classes -----------------------------------------------------------------------------------------------------------


def _posing_as(plain: Any, **methods: Any) -> type:
    """A subclass that is saved, shown and looked up by the name of its parent."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        made, arguments, *state = plain.__reduce_ex__(self, protocol)
        return (_unpickled, (plain,), *state) if arguments[0] is type(self) else (made, arguments, *state)

    own = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (plain,), {**own, "__reduce_ex__": __reduce_ex__, _PLAIN: plain, **methods})


def _unpickled(plain: Any) -> Any:
    made: Any = _carrying(plain) if hasattr(plain, "apply_chat_template") else _recording(plain)
    return made.__new__(made)


@functools.cache
def _carrying(plain: type) -> type:
    """A processor's class, whose outputs have the sounds beside their features."""
    made = {name: _maker(getattr(plain, name)) for name in _MAKERS if hasattr(plain, name)}
    if hasattr(plain, PROCESSING):
        made[PROCESSING] = noting_short_sounds(getattr(plain, PROCESSING), _note)
    return _posing_as(plain, **made)


def _note(problem: str) -> None:
    if (recorder := getattr(_thread, "recorder", None)) is not None:
        recorder.problem = recorder.problem or problem


@functools.cache
def _recording(plain: type) -> type:
    """An extractor's class, which notes what it is given within a call of its processor."""

    original: Callable[..., Any] = plain.__call__  # type: ignore[operator]
    first = list(inspect.signature(original).parameters)[1]

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = getattr(_thread, "recorder", None)
        if recorder is None:
            return original(self, *args, **kwargs)
        given = dict(zip([first], args, strict=False)) | kwargs
        clips, problem = _separate(given.pop(first, None))
        try:
            made = original(self, *args, **kwargs)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            if problem:
                raise UndefendableError(problem) from error  # the extractor's own words are about arrays
            raise
        recorder.note(self, clips, args[1:], given, made, problem)
        return made

    return _posing_as(plain, __call__=__call__)


def _maker(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(_thread, "recorder", None) is not None:  # within another of the same processor's
            return original(self, *args, **kwargs)
        recorder = _thread.recorder = _Recorder()
        try:
            made = original(self, *args, **kwargs)
        finally:
            _thread.recorder = None
        recorder.attach(made, type(self).__name__)
        return made

    return make


# -- one call ----------------------------------------------------------------------------------------------------------


class _Recorder:
    """The extractor's calls within one of its processor."""

    def __init__(self) -> None:
        self._extractor: Any = None
        self._calls: list[Any] = []
        self._name = ""
        self.problem = ""
        """Why no noise can be put on what was heard, to be said once a defence is asked for."""

    def note(
        self,
        extractor: Any,
        clips: list[np.ndarray],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: Any,
        problem: str,
    ) -> None:
        import torch

        from lmms_smoothguard.inputs.carried import Extraction

        self._extractor = extractor
        self._name = next((name for name in extractor.model_input_names if name in made), "")
        if not self._name or args:
            problem = f"{type(extractor).__name__} was called in a way that is not known"
        if problem:
            self.problem = problem
            return
        features = _tensor(made[self._name])
        heard = _heard(extractor, clips, kwargs, lambda output: torch.equal(_tensor(output[self._name]), features))
        self._calls.append(Extraction(heard, dict(kwargs), features))

    def attach(self, made: Any, maker: str) -> None:
        """Puts the clips beside the features, where a call gave any."""
        from lmms_smoothguard.inputs.carried import CLIPS, carried
        from lmms_smoothguard.inputs.media import AUDIO_KEYS

        if self._extractor is None or (not isinstance(made, Mapping) and not hasattr(made, "data")):
            return
        key = next((key for key in AUDIO_KEYS if made.get(key) is not None), None)
        if key is None:
            return
        found = carried(self._extractor, self._calls, key, self._name, made[key], maker, self.problem)
        made[CLIPS] = found


def _separate(sounds: Any) -> tuple[list[np.ndarray], str]:
    """What an extractor takes for sounds, one or several of them, each a copy of its own: callers may fill their buffers anew. And what
    stands in the way of noise on them, if anything does."""
    if hasattr(sounds, "detach"):
        sounds = sounds.detach().cpu().numpy()
    if isinstance(sounds, np.ndarray):
        sounds = [sounds] if sounds.ndim < 2 else list(sounds)
    elif sounds is not None and len(sounds) and not np.ndim(sounds[0]):
        sounds = [sounds]  # samples as plain numbers
    given = [np.asarray(one.detach().cpu() if hasattr(one, "detach") else one) for one in sounds or []]
    for number, one in enumerate(given, 1):
        if one.ndim != 1:
            short = one.shape.index(min(one.shape))  # channels: before the samples or, as soundfile has them, behind
            said = (
                f"has the shape {one.shape}; expected (samples,), one channel. Mix channels down: sound.mean({short})"
            )
        elif one.dtype.kind in "iub" and len(one):
            said = f"is made of {one.dtype} samples; expected floating point of full scale 1. Divide 16-bit samples by 32768"
        else:
            continue
        return [], f"sound {number} {said}"
    return [np.array(one, np.float32) for one in given], ""


def _tensor(values: Any) -> Any:
    import torch

    return values.detach().cpu() if hasattr(values, "detach") else torch.as_tensor(np.asarray(values))


def _heard(
    extractor: Any, clips: list[np.ndarray], options: Mapping[str, Any], same: Callable[[Any], bool]
) -> tuple[np.ndarray, ...]:
    """As much of the clips as their features are made of: some extractors drop what is beyond their window in silence, others give it
    windows or frames too. No attribute tells which. same: whether an output has the features of the whole clips."""
    longest = getattr(extractor, "n_samples", None)
    long = [] if longest is None else [clip for clip in clips if len(clip) > longest]
    if not long or not options.get("truncation", True):
        return tuple(clips)
    cut = [clip[:longest] for clip in clips]
    if not same(getattr(type(extractor), _PLAIN).__call__(extractor, cut, **options)):
        return tuple(clips)
    for clip in long:
        log.warning(
            "a sound of %.1f seconds is cut to the %.1f that its model hears",
            len(clip) / extractor.sampling_rate,
            longest / extractor.sampling_rate,
        )
    return tuple(cut)
