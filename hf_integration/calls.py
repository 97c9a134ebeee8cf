"""One call of `generate`: the defence in force for it, the answer through that defence, or a refusal.

Nothing here imports transformers when it is loaded: the override may be what is loading it, with transformers half done.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hf_integration.attached import attachments
from hf_integration.observing import watchers
from hf_integration.streaming import told_aside
from hf_integration.wrapping import ORIGINAL, is_ours
from lmms_smoothguard import plugins
from lmms_smoothguard.choice import Choice, choose
from lmms_smoothguard.config import SmoothGuardConfig, check_vote
from lmms_smoothguard.defenses.request import Defended, Request
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.inputs.carried import CLIPS

_UNSET: Any = object()
_OFF, _PLAIN, _TEXT, _DEFENDING = "off", "plain", "text", "defending"
_thread = threading.local()
_forced: Choice | None = None


# -- which defence ------------------------------------------------------------------------------------------------------


def force(smoothguard: Any) -> None:
    """Defends every `generate` of this process so, whatever a call, its generation config or the model's asks for; None lifts that.

    For servers: a client that brings a generation config of its own replaces the model's, and the defence in it. What cannot be
    defended is refused, as ever, and so is what bypasses `generate`. Raises ConfigError for what is no defence and for settings that
    defend nothing (one copy, no noise); what was forced before then stays so.
    """
    global _forced
    chosen = choose(smoothguard)
    if chosen is None and smoothguard is not None:
        raise ConfigError(f"smoothguard is {smoothguard!r}; expected a defence to force, or None to lift it")
    if chosen is not None and isinstance(chosen.config, SmoothGuardConfig):
        check_vote(chosen.config)
    _forced = chosen


def choice_of(model: Any, arguments: dict[str, Any]) -> Choice | None:
    """The defence in force, taken out of the arguments: the forced one over the call's own over its generation config's over the
    model's."""
    if _forced is not None:
        arguments.pop("smoothguard", None)
        return _forced
    base = choose(configured(model, arguments.get("generation_config")))
    own = arguments.pop("smoothguard", _UNSET)
    return base if own is _UNSET or own is None else choose(own, base)


def is_defended(asked: Any) -> bool:
    """Whether a defence is forced or asked for, by a call or by a generation config."""
    return _forced is not None or choose(asked) is not None


def configured(model: Any, generation_config: Any) -> Any:
    """`smoothguard` of a call's generation config, else of the model's; None where neither has one."""
    value = getattr(generation_config, "smoothguard", None)
    if value is None:
        value = getattr(getattr(model, "generation_config", None), "smoothguard", None)
    return value


# -- one call -----------------------------------------------------------------------------------------------------------


def _handled() -> list[tuple[Any, Any, str]]:
    """The calls that this thread is in, outermost first: the model, its original `generate`, and what became of the call:
    _OFF without a defence, _PLAIN where the call itself asked for none, _TEXT with nothing to defend, _DEFENDING while its copies are answered."""
    if not hasattr(_thread, "handled"):
        _thread.handled = []
    return _thread.handled  # type: ignore[no-any-return]


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Within it, this thread is in no call."""
    before, _thread.handled = _handled(), []
    try:
        yield
    finally:
        _thread.handled = before


def is_part_of_a_call(model: Any, original: Any, asked: Any = None) -> bool:
    """Whether a call belongs to one that this thread is in: `super().generate()`, and whatever a model calls of itself and of
    the models inside it while its copies are answered. Any other call is a request of its own, and so is every one that has a
    `smoothguard` of its own (`asked`), which models do not pass on, and every one from within a call without a defence."""
    if asked is not None:
        return False
    for outer, called, state in _handled():
        if outer is model and state != _OFF and (state != _TEXT or called is not original):
            return True
        if state == _DEFENDING and any(part is model for part in outer.modules()):
            return True
    return False


def bind(signature: inspect.Signature, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the unnamed main input under the model's own name for it."""
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        from transformers.generation.utils import GenerationMixin

        signature = inspect.signature(GenerationMixin.generate)  # to which `*args, **kwargs` are handed on
    names = [name for name in signature.parameters if name != "self"]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    main = bound.pop("inputs", None) if "inputs" in names else None
    if main is not None:
        bound.setdefault(model.main_input_name, main)
    return bound


def generate_defended(model: Any, settings: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`model.generate(*args, **kwargs, smoothguard=settings)`, from within a call of it: what an exported `custom_generate` does.

    A `smoothguard` among the arguments is the caller's own, and changes the settings or switches them off. Without one, nothing is
    defended within a call that is defended already, or that asked for no defence. Raises what `generate` raises.
    """
    method = type(model).generate
    original = getattr(method, ORIGINAL) if is_ours(method) else method
    asked = kwargs.pop("smoothguard", None)
    given = {name: value for name, value in kwargs.items() if name != CLIPS}

    def plain() -> Any:
        return original(model, *args, **given)

    if asked is None and any(outer is model and state in (_DEFENDING, _PLAIN) for outer, _, state in _handled()):
        return plain()
    kwargs["smoothguard"] = settings if asked is None else choose(asked, choose(settings)) or False
    return handle(model, original, lambda: bind(inspect.signature(original), model, args, kwargs), plain)


def handle(model: Any, original: Any, arguments_of: Callable[[], dict[str, Any]], plain: Callable[[], Any]) -> Any:
    """One request: answered through the defence in force, or plainly where there is none or nothing to defend."""
    handled = _handled()
    depth = len(handled)
    handled.append((model, original, _DEFENDING))  # what a defence calls before it has decided is part of it
    try:
        arguments = arguments_of()
        asked = arguments.get("smoothguard")
        choice = choice_of(model, arguments)
        if choice is None:
            handled[depth] = (model, original, _OFF if asked is None else _PLAIN)
            return plain()
        if arguments.get("streamer") is not None:
            arguments["streamer"] = told_aside(arguments["streamer"], _aside)
        tokenizer, image_processor = attachments(model)
        request = Request(
            model,
            functools.partial(original, model),
            arguments,
            arguments.get("tokenizer") or tokenizer,
            image_processor,
        )
        with plugins.blame("defenses", choice.name):
            defended = _defend(request, choice)
        if defended is None:
            handled[depth] = (model, original, _TEXT)
            return plain()
        for watcher in watchers():
            watcher.defended += 1
            watcher.verdicts.append(defended.verdicts)
        return defended.output
    except BaseException as error:
        for watcher in watchers():
            watcher.error = watcher.error or error
        raise
    finally:
        del handled[depth:]


def _defend(request: Request, choice: Choice) -> Defended | None:
    defended = plugins.load("defenses", choice.name).defend(request, choice.config)
    if defended is None and request.media() is not None:
        raise UndefendableError(f"defence {choice.name!r} did nothing with a request that has media; it is refused")
    if defended is not None and not isinstance(defended, Defended):
        raise UndefendableError(
            f"defence {choice.name!r} returned a {type(defended).__name__}; expected lmms_smoothguard.defenses.Defended"
        )
    return defended
