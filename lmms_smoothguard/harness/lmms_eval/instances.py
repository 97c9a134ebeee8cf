"""An lmms-eval request: its document, its images and sounds, and itself with others in their place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.errors import AttackError, explain
from lmms_smoothguard.sounds import Sound, sound_of


def document_of(wrapper: Any, request: Instance) -> Any:
    """The document behind a request."""
    *_, doc_id, task, split = request.args
    return wrapper.task_dict[task][split][doc_id]


@contextlib.contextmanager
def reading(request: Instance) -> Iterator[None]:
    """Names the sample when its document, pictures or sounds cannot be read: what a decoder says of broken bytes does not."""
    try:
        yield
    except Exception as error:
        raise AttackError(
            f"the media of {request.task_name}[{request.doc_id}] cannot be read ({explain(error)}); expected pictures that PIL "
            "opens, and whole sounds. Mend the data set, or leave the sample out with --offset and --limit."
        ) from error


def _place_of_media(wrapper: Any) -> int:
    """Where a request's arguments have doc_to_messages (chat) or doc_to_visual (simple)."""
    return 2 if getattr(wrapper, "is_simple", True) else 1


def images_of(wrapper: Any, request: Instance) -> list[Image.Image]:
    """The request's own images, in order."""
    return _media_of(wrapper, request, _is_image)


def media_kinds(wrapper: Any, request: Instance) -> set[str]:
    """Which a request has in memory, of `pictures` and `sounds`."""
    found = _media_of(wrapper, request, lambda item: _is_image(item) or _is_sound(item))
    return {"pictures" if _is_image(item) else "sounds" for item in found}


def sounds_of(wrapper: Any, request: Instance) -> list[Sound]:
    """The request's own sounds, in order: those in memory, as arrays with a rate or as a decoder of torchcodec's.

    Raises ConfigError for one that cannot be read.
    """
    return [sound_of(item) for item in _media_of(wrapper, request, _is_sound)]


def _is_image(item: Any) -> bool:
    return isinstance(item, Image.Image)


def _is_sound(item: Any) -> bool:
    return hasattr(item, "get_all_samples") or (isinstance(item, Mapping) and "array" in item)


def _media_of(wrapper: Any, request: Instance, wanted: Callable[[Any], bool]) -> list[Any]:
    media = request.args[_place_of_media(wrapper)](document_of(wrapper, request))
    if getattr(wrapper, "is_simple", True):
        return [item for item in media or [] if wanted(item)]
    return [part["url"] for part in _parts(media, wanted)]


def count_media(wrapper: Any, request: Instance) -> int:
    """How much a request holds beside text: images in whatever form, sounds, videos."""
    media = request.args[_place_of_media(wrapper)](document_of(wrapper, request))
    if getattr(wrapper, "is_simple", True):
        return sum(item is not None for item in media or [])
    contents = [message["content"] for message in media if not isinstance(message["content"], str)]
    return sum(part.get("type") != "text" for content in contents for part in content)


def has_media(wrapper: Any, request: Instance) -> bool:
    """Whether a request holds anything but text."""
    return count_media(wrapper, request) > 0


def _parts(messages: Any, wanted: Callable[[Any], bool]) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        for part in (message["content"] if isinstance(message["content"], list) else [])
        if part.get("type") != "text" and wanted(part.get("url"))
    ]


def with_images(wrapper: Any, request: Instance, pictures: Sequence[Image.Image]) -> tuple[Any, ...]:
    """The request's arguments with other images in the same places."""
    return _with_media(wrapper, request, pictures, _is_image)


def with_sounds(wrapper: Any, request: Instance, sounds: Sequence[Sound]) -> tuple[Any, ...]:
    """The request's arguments with other sounds in the same places."""
    return _with_media(wrapper, request, list(map(_given, sounds)), _is_sound)


def _given(sound: Sound) -> dict[str, Any]:
    """As lmms-eval's wrappers take it."""
    return {"array": sound.samples, "sampling_rate": sound.rate}


def _with_media(
    wrapper: Any, request: Instance, others: Sequence[Any], wanted: Callable[[Any], bool]
) -> tuple[Any, ...]:
    place = _place_of_media(wrapper)
    own: Callable[..., Any] = request.args[place]

    def visuals(doc: Any, *args: Any, **kwargs: Any) -> Any:
        left = list(others)
        return [left.pop(0) if wanted(item) else item for item in own(doc, *args, **kwargs)]

    def messages(doc: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(doc, *args, **kwargs)
        for part, other in zip(_parts(made, wanted), others, strict=True):
            part["url"] = other
        return made

    swapped = list(request.args)
    swapped[place] = visuals if getattr(wrapper, "is_simple", True) else messages
    return tuple(swapped)


def with_picture_added(wrapper: Any, request: Instance, picture: Image.Image) -> tuple[Any, ...]:
    """The arguments of a request of text alone with one picture, at the beginning of the first user turn."""
    place = _place_of_media(wrapper)
    own: Callable[..., Any] = request.args[place]

    def messages(doc: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(doc, *args, **kwargs)
        user = next(message for message in made if message["role"] == "user")
        content = user["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        user["content"] = [{"type": "image", "url": picture}, *text]
        return made

    swapped = list(request.args)
    swapped[place] = (lambda doc, *args, **kwargs: [picture]) if getattr(wrapper, "is_simple", True) else messages
    return tuple(swapped)


def texts_of(wrapper: Any, request: Instance) -> list[str]:
    """What a request asks: its context, and the text parts of its user turns."""
    texts = [request.args[0]]
    if not getattr(wrapper, "is_simple", True):
        for message in request.args[_place_of_media(wrapper)](document_of(wrapper, request)):
            content = message["content"] if message["role"] == "user" else ""
            parts = [content] if isinstance(content, str) else [part.get("text") for part in content]
            texts += ["".join(part for part in parts if part), *(part for part in parts if part)]
    return [text for text in texts if isinstance(text, str)]


def as_asked(wrapper: Any, request: Instance, text: str, medium: Image.Image | Sound) -> Instance:
    """Another question about another picture or sound, asked as a request is: its settings and system turns, one new token."""
    own: Callable[..., Any] = request.args[_place_of_media(wrapper)]
    kind, item = ("audio", _given(medium)) if isinstance(medium, Sound) else ("image", medium)

    def messages(doc: Any, *args: Any, **kwargs: Any) -> Any:
        system = [message for message in own(doc, *args, **kwargs) if message["role"] == "system"]
        content = [{"type": kind, "url": item}, {"type": "text", "text": text}]
        return [*system, {"role": "user", "content": content}]

    swapped = [{**part, "max_new_tokens": 1} if isinstance(part, dict) else part for part in request.args]
    simple = getattr(wrapper, "is_simple", True)
    swapped[_place_of_media(wrapper)] = (lambda doc, *args, **kwargs: [item]) if simple else messages
    swapped[0] = text
    return dataclasses.replace(request, arguments=tuple(swapped))
