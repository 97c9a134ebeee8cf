"""Ways around `generate`, refused wherever a defence is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.configuration_utils import GenerationConfig

from hf_integration.calls import configured, is_defended
from hf_integration.wrapping import is_exported, is_ours, make_ours, posing_as
from lmms_smoothguard.errors import UndefendableError


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call's generation config, by name or not."""
    return kwargs.get("generation_config", next((a for a in args if isinstance(a, GenerationConfig)), None))


def _is_asked_for(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is to be defended; takes its own `smoothguard` out of the arguments."""
    own = kwargs.pop("smoothguard", None)
    return is_defended(configured(model, _given(args, kwargs)) if own is None else own)


def bypassing(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A method that answers without `generate`, such as continuous batching's."""

    @posing_as(original)
    def bypass(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_defended(kwargs.pop("smoothguard", None)) or is_defended(configured(self, _given(args, kwargs))):
            raise UndefendableError(
                f"{name}() bypasses generate() and with it SmoothGuard, which the call or the generation config asks for; "
                "use generate(), or set generation_config.smoothguard = False"
            )
        return original(self, *args, **kwargs)

    return bypass


def bringing_its_own(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint with generation code of its own (trust_remote_code) puts it on the instance, past the class."""

    @posing_as(original)
    def adjust_generation_fn(self: Any, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        refuse_own_code(self)

    return adjust_generation_fn


def refuse_own_code(model: Any) -> None:
    """Stands before a `generate` on the instance itself that is none of ours."""
    own = vars(model).get("generate")
    if own is not None and not is_ours(own) and not is_exported(own):
        vars(model)["generate"] = _OwnCode(model, own)


def allow_own_code(model: Any) -> None:
    """Takes that away again."""
    found = vars(model).get("generate")
    if isinstance(found, _OwnCode):
        vars(model)["generate"] = found.own


class _OwnCode:
    """An object and no closure, so that a copy of the model has one of its own."""

    def __init__(self, model: Any, own: Callable[..., Any]) -> None:
        self.model, self.own = model, own
        make_ours(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_asked_for(self.model, args, kwargs):
            raise UndefendableError(
                "this model brings generation code of its own, on the instance, which cannot be defended; load it with "
                "trust_remote_code=False, delete its attribute `generate`, or set generation_config.smoothguard = False"
            )
        return self.own(*args, **kwargs)


def standing_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `generate` that is not GenerationMixin's, such as one by diffusion: no request of it can be defended."""

    @posing_as(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_asked_for(self, args, kwargs):
            raise UndefendableError(
                f"{type(self).__name__} generates in a way of its own, which is not defended; expected a model with transformers' "
                "GenerationMixin. Pass smoothguard=False to run this request undefended."
            )
        return original(self, *args, **kwargs)

    return generate
