"""Functions of ours in the place of others: how they look from outside, and how they are told apart."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

ORIGINAL = "__smoothguard_original__"
"""An attribute of the override's functions: what stood there before."""
EXPORTED = "__smoothguard_export__"
"""An attribute of generation code that defends by itself (`lmms_smoothguard.export`)."""
_OURS = "__smoothguard_ours__"
"""An attribute of what is ours: itself, for functools.wraps hands attributes on to functions that are not."""


def posing_as(original: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As functools.wraps, signature and all, but without `__wrapped__`, which would hand out what answers undefended."""

    def pose(function: Callable[..., Any]) -> Callable[..., Any]:
        functools.update_wrapper(function, original, updated=())
        del function.__wrapped__  # type: ignore[attr-defined]
        # Decorators keep what they decorate in attributes of other names, too.
        vars(function).update({name: value for name, value in vars(original).items() if not callable(value)})
        function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        setattr(function, ORIGINAL, original)
        make_ours(function)
        return function

    return pose


def make_ours(made: Any) -> None:
    """Marks what is put in the place of a `generate`."""
    setattr(made, _OURS, made)


def is_ours(found: Any) -> bool:
    """Whether a `generate`, be it bound or given some of its arguments, is marked so."""
    inside = _inside(found)
    return inside is not None and getattr(inside, _OURS, None) is inside


def is_exported(found: Any) -> bool:
    """Whether it is generation code that defends by itself."""
    return hasattr(_inside(found), EXPORTED)


def _inside(found: Any) -> Any:
    while isinstance(found, functools.partial | functools.partialmethod | MethodType):
        found = found.__func__ if isinstance(found, MethodType) else found.func
    return found


def around(own: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """`wrap` around what stands in a class as `generate`: a function, or whatever else gives a model something to call."""
    if isinstance(own, functools.partialmethod):  # inside of it, where its arguments are seen
        return functools.partialmethod(around(own.func, wrap), *own.args, **own.keywords)
    wrapped = wrap(own if inspect.isfunction(own) else _called_through(own))
    return _OfModels(own, wrapped) if isinstance(own, staticmethod | classmethod) else wrapped


def _called_through(own: Any) -> Callable[..., Any]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = own.__get__(self, type(self)) if hasattr(type(own), "__get__") else own
        return method(*args, **kwargs)

    return generate


class _OfModels:
    """What a model has of a static or class method; the class itself, which has no weights to answer by, has the method."""

    def __init__(self, own: Any, wrapped: Callable[..., Any]) -> None:
        self._own, self._wrapped = own, wrapped
        make_ours(self)

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        return self._own.__get__(None, owner) if model is None else MethodType(self._wrapped, model)
