"""The override of `generate`: reads the request's config, hands it to the defence, returns what the caller expects.

It wraps `GenerationMixin.generate` and every subclass's own `generate`, loaded already or later. `custom_generate` is
the wrong seam: most multimodal models have encoded their images and dropped the pixels before it runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Not `from transformers import ...`: this runs right after generation.utils was imported, when the rest may be half done.
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.utils import GenerationMixin

import hf_integration
from lmms_smoothguard import plugins
from lmms_smoothguard.choice import Choice, choose
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.request import Defended, Request, SmoothGuardOutput
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.inputs.fitting import misfits

log = logging.getLogger(__name__)

EXPORTED = "__smoothguard_export__"
"""An attribute of generation code that defends by itself (`lmms_smoothguard.export`)."""
_UNSET: Any = object()
_OFF, _PLAIN, _TEXT, _DEFENDING = "off", "plain", "text", "defending"
_lock = threading.RLock()
_thread = threading.local()
_originals: list[tuple[type, str, Any]] = []  # (class, attribute, what stood there); _UNSET: nothing did
_attached: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_forced: Choice | None = None


# -- what a model's processor is, and who watches --------------------------------------------------------------------


def attach(model: Any, processor: Any) -> None:
    """Tells the defence which processor a model is used with: its tokenizer decodes the answers that are clustered,
    its image processor gives the scale of pixel-space noise. Without it both are looked up in the model's directory."""
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None and hasattr(processor, "image_mean"):
        image_processor = processor
    tokenizer = getattr(processor, "tokenizer", processor if hasattr(processor, "batch_decode") else None)
    for sentence in misfits(model, tokenizer, image_processor):
        log.warning("%s", sentence)
    for one in _with_wrapped(model):
        _attached[one] = (tokenizer, image_processor)


def _with_wrapped(model: Any) -> Iterator[Any]:
    """A model and those inside it whose `generate` answers for it: torch.compile's, PEFT's and data-parallel wrappers."""
    while model is not None:
        yield model
        inside = getattr(model, "get_base_model", None)
        model = (
            inside()
            if callable(inside)
            else model.__dict__.get("_modules", {}).get("_orig_mod", model.__dict__.get("_modules", {}).get("module"))
        )


def _attachments(model: Any) -> tuple[Any, Any]:
    if model not in _attached:
        from transformers import AutoTokenizer

        tokenizer, where = None, getattr(model, "name_or_path", "")
        if where:
            with contextlib.suppress(OSError, ValueError, ImportError, KeyError):
                tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        _attached[model] = (tokenizer, None)
    return _attached[model]


@dataclass(eq=False)
class Observation:
    """What happened to one thread's calls: how many were defended, their verdicts (one list a call, one entry a row;
    empty for a defence that gives none), and the first error one of them raised."""

    defended: int = 0
    verdicts: list[list[SmoothGuardOutput]] = field(default_factory=list)
    error: BaseException | None = None


@contextlib.contextmanager
def observe() -> Iterator[Observation]:
    """Watches this thread's `generate` calls; for harnesses that swallow errors or take the answer only."""
    seen = Observation()
    watchers = _watchers()
    watchers.append(seen)
    try:
        yield seen
    finally:
        watchers.remove(seen)


def _handled() -> list[tuple[Any, Any, str]]:
    """The calls that this thread is in, outermost first: the model, its original `generate`, and what became of the call:
    _OFF without a defence, _PLAIN where the call itself asked for none, _TEXT with nothing to defend, _DEFENDING while its copies are answered."""
    if not hasattr(_thread, "handled"):
        _thread.handled = []
    return _thread.handled  # type: ignore[no-any-return]


def _is_part_of_a_call(model: Any, original: Any) -> bool:
    """Whether a call belongs to one that this thread is in: `super().generate()`, and whatever a model calls of itself and of
    the models inside it while its copies are answered. Any other call is a request of its own."""
    for outer, called, state in _handled():
        if outer is model and (state != _TEXT or called is not original):
            return True
        if state == _DEFENDING and any(part is model for part in outer.modules()):
            return True
    return False


def _watchers() -> list[Observation]:
    if not hasattr(_thread, "watchers"):
        _thread.watchers = []
    return _thread.watchers


# -- the override -----------------------------------------------------------------------------------------------------


def force(smoothguard: Any) -> None:
    """Defends every `generate` of this process so, whatever a call, its generation config or the model's asks for; None lifts that.

    For servers: a client that brings a generation config of its own replaces the model's, and the defence in it. What cannot be
    defended is refused, as ever, and so is what bypasses `generate`. Raises ConfigError for what is no defence.
    """
    global _forced
    _forced = choose(smoothguard)
    if _forced is None and smoothguard is not None:
        raise ConfigError(f"smoothguard is {smoothguard!r}; expected a defence to force, or None to lift it")


def _choice_of(model: Any, arguments: dict[str, Any]) -> Choice | None:
    """The defence in force, taken out of the arguments: the forced one over the call's own over its generation config's over the
    model's."""
    if _forced is not None:
        arguments.pop("smoothguard", None)
        return _forced
    base = choose(_configured(model, arguments.get("generation_config")))
    own = arguments.pop("smoothguard", _UNSET)
    return base if own is _UNSET or own is None else choose(own, base)


def _configured(model: Any, generation_config: Any) -> Any:
    configured = getattr(generation_config, "smoothguard", None)
    if configured is None:
        configured = getattr(getattr(model, "generation_config", None), "smoothguard", None)
    return configured


def _bind(signature: inspect.Signature, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, the unnamed main input under the model's own name for it."""
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        signature = inspect.signature(
            GenerationMixin.generate
        )  # to which a `generate(self, *args, **kwargs)` hands them on
    names = [name for name in signature.parameters if name != "self"]
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    main = bound.pop("inputs", None) if "inputs" in names else None
    if main is not None:
        bound.setdefault(model.main_input_name, main)
    return bound


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_part_of_a_call(self, original):
            return original(self, *args, **kwargs)

        def plain() -> Any:
            kwargs.pop("smoothguard", None)
            return original(self, *args, **kwargs)

        return _handle(self, original, lambda: _bind(signature, self, args, kwargs), plain)

    generate.__smoothguard_original__ = original  # type: ignore[attr-defined]
    return generate


def generate_defended(model: Any, settings: Any, /, **kwargs: Any) -> Any:
    """`model.generate(**kwargs, smoothguard=settings)`, from within a call of it: what an exported `custom_generate` does.

    A `smoothguard` among the arguments is the caller's own, and goes before. Within a call that is defended already, or that asked for
    no defence, nothing is defended. Raises what `generate` raises.
    """
    method = type(model).generate
    original = getattr(method, "__smoothguard_original__", method)
    kwargs.setdefault("smoothguard", settings)

    def plain() -> Any:
        return original(model, **{name: value for name, value in kwargs.items() if name != "smoothguard"})

    if any(outer is model and state in (_DEFENDING, _PLAIN) for outer, _, state in _handled()):
        return plain()
    return _handle(model, original, lambda: _bind(inspect.signature(original), model, (), kwargs), plain)


def _handle(model: Any, original: Any, bind: Callable[[], dict[str, Any]], plain: Callable[[], Any]) -> Any:
    """One request: answered through the defence in force, or plainly where there is none or nothing to defend."""
    handled = _handled()
    depth = len(handled)
    handled.append((model, original, _DEFENDING))  # what a defence calls before it has decided is part of it
    try:
        arguments = bind()
        asked = arguments.get("smoothguard")
        choice = _choice_of(model, arguments)
        if choice is None:
            handled[depth] = (model, original, _OFF if asked is None else _PLAIN)
            return plain()
        tokenizer, image_processor = _attachments(model)
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
        for watcher in _watchers():
            watcher.defended += 1
            watcher.verdicts.append(defended.verdicts)
        return defended.output
    except BaseException as error:
        for watcher in _watchers():
            watcher.error = watcher.error or error
        raise
    finally:
        del handled[depth:]


def _defend(request: Request, choice: Choice) -> Defended | None:
    defended = plugins.load("defenses", choice.name).defend(request, choice.config)
    if defended is None and request.images() is not None:
        raise UndefendableError(f"defence {choice.name!r} did nothing with a request that has images; it is refused")
    if defended is not None and not isinstance(defended, Defended):
        raise UndefendableError(
            f"defence {choice.name!r} returned a {type(defended).__name__}; expected lmms_smoothguard.defenses.Defended"
        )
    return defended


def _refusing(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def bypass(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("generation_config", next((a for a in args if isinstance(a, GenerationConfig)), None))
        if _forced is not None or choose(_configured(self, given)) is not None:
            raise UndefendableError(
                f"{name}() bypasses generate() and with it SmoothGuard, which the generation config asks for; "
                "use generate(), or set generation_config.smoothguard = False"
            )
        return original(self, *args, **kwargs)

    return bypass


def _adjusting(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint with generation code of its own (trust_remote_code) puts it on the instance, past the class."""

    @functools.wraps(original)
    def adjust_generation_fn(self: Any, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        own = self.__dict__.get("generate")
        if own is not None and not hasattr(getattr(own, "func", own), EXPORTED):

            def generate(*call: Any, **options: Any) -> Any:
                asked = options.pop("smoothguard", _configured(self, options.get("generation_config")))
                if _forced is not None or choose(asked) is not None:
                    raise UndefendableError(
                        "this checkpoint brings generation code of its own, which cannot be defended; load it with "
                        "trust_remote_code=False, or set generation_config.smoothguard = False"
                    )
                return own(*call, **options)

            self.generate = generate

    return adjust_generation_fn


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
    _originals.append((owner, name, owner.__dict__.get(name, _UNSET)))
    setattr(owner, name, value)


def _wrap_own_generate(owner: type) -> None:
    own = owner.__dict__.get("generate")
    if inspect.isfunction(own) and not hasattr(own, "__smoothguard_original__"):
        _replace(owner, "generate", _wrapped(own))


def _standing_apart(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `generate` that is not GenerationMixin's, such as one by diffusion: no request of it can be defended."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _choice_of(self, kwargs) is not None:  # which it takes out of them
            raise UndefendableError(
                f"{type(self).__name__} generates in a way of its own, which is not defended; expected a model with transformers' "
                "GenerationMixin. Pass smoothguard=False to run this request undefended."
            )
        return original(self, *args, **kwargs)

    generate.__smoothguard_original__ = original  # type: ignore[attr-defined]
    return generate


def _guard(cls: type) -> None:
    """Reaches a `generate` that a model class has from neither GenerationMixin nor itself: another mixin's."""
    owner = next((base for base in cls.__mro__ if "generate" in base.__dict__), None)
    own = None if owner is None else owner.__dict__["generate"]
    if owner is not None and inspect.isfunction(own) and not hasattr(own, "__smoothguard_original__"):
        _replace(owner, "generate", (_wrapped if issubclass(cls, GenerationMixin) else _standing_apart)(own))


def _guard_models() -> None:
    """Every model class, those there are and those to come; nothing where the module of models is not imported yet."""
    base: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if base is None or any(owner is base for owner, _, _ in _originals):
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
                _replace(GenerationMixin, name, _refusing(original, name))

        adjust = getattr(GenerationMixin, "adjust_generation_fn", None)
        if adjust is not None:
            _replace(GenerationMixin, "adjust_generation_fn", _adjusting(adjust))

        def __init_subclass__(cls: type, **kwargs: Any) -> None:
            super(GenerationMixin, cls).__init_subclass__(**kwargs)
            with _lock:
                if _originals:
                    _wrap_own_generate(cls)

        _replace(GenerationMixin, "__init_subclass__", classmethod(__init_subclass__))
        _guard_models()


def installed() -> bool:
    """Whether the override stands."""
    return hasattr(GenerationMixin.generate, "__smoothguard_original__")


def uninstall() -> None:
    """Puts back what stood there before, in reverse order."""
    with _lock:
        while _originals:
            owner, name, original = _originals.pop()
            if original is _UNSET:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


if hf_integration.asked_for():  # whoever imported this module first: nothing else is sure to come after it
    install()
