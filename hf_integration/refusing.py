"""Ways around `generate`, refused wherever a defence is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.generation.configuration_utils import GenerationConfig

from hf_integration.calls import choice_of, configured, is_defended
from lmms_smoothguard.errors import UndefendableError

EXPORTED = "__smoothguard_export__"
"""An attribute of generation code that defends by itself (`lmms_smoothguard.export`)."""


def bypassing(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A method that answers without `generate`, such as continuous batching's."""

    @functools.wraps(original)
    def bypass(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("generation_config", next((a for a in args if isinstance(a, GenerationConfig)), None))
        if is_defended(configured(self, given)):
            raise UndefendableError(
                f"{name}() bypasses generate() and with it SmoothGuard, which the generation config asks for; "
                "use generate(), or set generation_config.smoothguard = False"
            )
        return original(self, *args, **kwargs)

    return bypass


def bringing_its_own(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint with generation code of its own (trust_remote_code) puts it on the instance, past the class."""

    @functools.wraps(original)
    def adjust_generation_fn(self: Any, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        own = self.__dict__.get("generate")
        if own is not None and not hasattr(getattr(own, "func", own), EXPORTED):

            def generate(*call: Any, **options: Any) -> Any:
                asked = options.pop("smoothguard", configured(self, options.get("generation_config")))
                if is_defended(asked):
                    raise UndefendableError(
                        "this checkpoint brings generation code of its own, which cannot be defended; load it with "
                        "trust_remote_code=False, or set generation_config.smoothguard = False"
                    )
                return own(*call, **options)

            self.generate = generate

    return adjust_generation_fn


def standing_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `generate` that is not GenerationMixin's, such as one by diffusion: no request of it can be defended."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if choice_of(self, kwargs) is not None:  # which it takes out of them
            raise UndefendableError(
                f"{type(self).__name__} generates in a way of its own, which is not defended; expected a model with transformers' "
                "GenerationMixin. Pass smoothguard=False to run this request undefended."
            )
        return original(self, *args, **kwargs)

    generate.__smoothguard_original__ = original  # type: ignore[attr-defined]
    return generate
