"""The override of `generate`: what is put in place of transformers' own, and taken out again.

It wraps `GenerationMixin.generate` and every subclass's own `generate`, loaded already or later, and refuses a model's own, which
hangs on the instance. `custom_generate` is the wrong seam: most multimodal models have encoded their images and dropped the pixels
before it runs.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

# Not `from transformers import ...`: this runs right after generation.utils was imported, when the rest may be half done.
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin

import hf_integration
from hf_integration.attached import with_wrapped
from hf_integration.calls import bind, handle, is_part_of_a_call
from hf_integration.refusing import allow_own_code, bringing_its_own, bypassing, refuse_own_code, standing_apart
from hf_integration.wrapping import around, is_exported, is_ours, posing_as
from lmms_smoothguard.choice import Choice, choose
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.inputs.carried import CLIPS

_UNSET: Any = object()
_lock = threading.RLock()
_originals: list[tuple[type, str, Any, Any]] = []  # (class, attribute, what stood there, ours); _UNSET: nothing did


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @posing_as(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _originals:  # somebody kept this function; the override is out
            return original(self, *args, **kwargs)

        def plain() -> Any:
            for ours in ("smoothguard", CLIPS):
                kwargs.pop(ours, None)
            return original(self, *args, **kwargs)

        if is_part_of_a_call(self, original, kwargs.get("smoothguard")):
            return plain()
        return handle(self, original, lambda: bind(signature, self, args, kwargs), plain)

    return generate


class _ConfigField:
    """`GenerationConfig.smoothguard`: checked when it is set, kept as plain JSON, so that it survives save and load."""

    def __get__(self, config: Any, owner: type | None = None) -> Any:
        if config is None:
            return None
        return config.__dict__.get("smoothguard")

    def __set__(self, config: Any, value: Any) -> None:
        parsed = choose(value)
        if isinstance(value, SmoothGuardConfig | Choice) and parsed is not None:
            value = parsed.to_dict()
        config.__dict__["smoothguard"] = dict(value) if isinstance(value, Mapping) else value
        if parsed is not None:
            # A config derived from the model's is derived anew on reload, which would lose the entry.
            config._from_model_config = False


def _replace(owner: type, name: str, value: Any) -> None:
    _originals.append((owner, name, owner.__dict__.get(name, _UNSET), value))
    setattr(owner, name, value)


def _wrap_own_generate(owner: type, wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = _wrapped) -> None:
    own = owner.__dict__.get("generate")
    if (callable(own) or hasattr(type(own), "__get__")) and not is_ours(own):
        _replace(owner, "generate", around(own, wrap))


def _guard(cls: type) -> None:
    """Reaches a `generate` that a model class has from neither GenerationMixin nor itself: another mixin's."""
    owner = next((base for base in cls.__mro__ if "generate" in base.__dict__), None)
    if owner is not None:
        _wrap_own_generate(owner, _wrapped if issubclass(cls, GenerationMixin) else standing_apart)


def _guard_models() -> None:
    """Every model class, those there are and those to come; nothing where the module of models is not imported yet."""
    base: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None or any(owner is base for owner, *_ in _originals):
        return
    pending = [base]
    while pending:
        cls = pending.pop()
        _guard(cls)
        pending.extend(cls.__subclasses__())
    own = base.__dict__.get("__init_subclass__")

    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        if own is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            own.__func__(cls, **kwargs)
        with _lock:
            if _originals:
                _guard(cls)

    _replace(base, "__init_subclass__", classmethod(__init_subclass__))


def install() -> None:
    """Puts the override in place; a second call only reaches models that were not imported at the first."""
    with _lock:
        if _originals:
            _guard_models()
            return
        _replace(GenerationConfig, "smoothguard", _ConfigField())
        _wrap_own_generate(GenerationMixin)
        pending = list(GenerationMixin.__subclasses__())
        while pending:
            owner = pending.pop()
            _wrap_own_generate(owner)
            pending.extend(owner.__subclasses__())
        for name in ("generate_batch", "init_continuous_batching"):
            original = getattr(GenerationMixin, name, None)
            if original is not None:
                _replace(GenerationMixin, name, bypassing(original, name))

        adjust = getattr(GenerationMixin, "adjust_generation_fn", None)
        if adjust is not None:
            _replace(GenerationMixin, "adjust_generation_fn", bringing_its_own(adjust))

        def __init_subclass__(cls: type, **kwargs: Any) -> None:
            super(GenerationMixin, cls).__init_subclass__(**kwargs)
            with _lock:
                if _originals:
                    _wrap_own_generate(cls)

        _replace(GenerationMixin, "__init_subclass__", classmethod(__init_subclass__))
        _guard_models()
        for model in _living():
            refuse_own_code(model)


def _living() -> list[Any]:
    """The models that there are, told by their type alone: other objects may do things when they are asked for an attribute."""
    if not GenerationMixin.__subclasses__():
        return []
    return [found for found in gc.get_objects() if issubclass(type(found), GenerationMixin)]


def installed() -> bool:
    """Whether the override stands."""
    return is_ours(GenerationMixin.generate)


def reaches(model: Any) -> bool:
    """Whether the `generate` that a model, or a wrapper of one, would call now is ours."""
    layers = list(with_wrapped(model))
    hanging = [vars(layer)["generate"] for layer in layers if "generate" in getattr(layer, "__dict__", {})]
    called = hanging[0] if hanging else inspect.getattr_static(type(layers[-1]), "generate", None)
    return is_exported(called) or (installed() and is_ours(called))


def uninstall() -> None:
    """Puts back what stood there before, in reverse order, but not in place of what somebody has put there since."""
    with _lock:
        for model in _living():
            allow_own_code(model)
        while _originals:
            owner, name, original, ours = _originals.pop()
            if owner.__dict__.get(name) is not ours:
                continue
            if original is _UNSET:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


if hf_integration.asked_for():  # whoever imported this module first: nothing else is sure to come after it
    install()
