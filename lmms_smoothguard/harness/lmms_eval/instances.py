"""An lmms-eval request: its document, its images, and itself with other images in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.errors import AttackError, explain


def document_of(wrapper: Any, request: Instance) -> Any:
    """The document behind a request."""
    *_, doc_id, task, split = request.args
    return wrapper.task_dict[task][split][doc_id]


@contextlib.contextmanager
def reading(request: Instance) -> Iterator[None]:
    """Names the sample when its document or pictures cannot be read: what a decoder says of broken bytes does not."""
    try:
        yield
    except Exception as error:
        raise AttackError(
            f"the pictures of {request.task_name}[{request.doc_id}] cannot be read ({explain(error)}); expected pictures "
            "that PIL opens. Mend the data set, or leave the sample out with --offset and --limit."
        ) from error


def _place_of_media(wrapper: Any) -> int:
    """Where a request's arguments have doc_to_messages (chat) or doc_to_visual (simple)."""
    return 2 if getattr(wrapper, "is_simple", True) else 1


def images_of(wrapper: Any, request: Instance) -> list[Image.Image]:
    """The request's own images, in order."""
    media = request.args[_place_of_media(wrapper)](document_of(wrapper, request))
    if getattr(wrapper, "is_simple", True):
        return [item for item in media or [] if isinstance(item, Image.Image)]
    return [part["url"] for part in _image_parts(media)]


def has_media(wrapper: Any, request: Instance) -> bool:
    """Whether a request holds anything but text: images in whatever form, sounds, videos."""
    media = request.args[_place_of_media(wrapper)](document_of(wrapper, request))
    if getattr(wrapper, "is_simple", True):
        return any(item is not None for item in media or [])
    contents = [message["content"] for message in media if not isinstance(message["content"], str)]
    return any(part.get("type") != "text" for content in contents for part in content)


def _image_parts(messages: Any) -> list[dict[str, Any]]:
    return [
        part
        for message in messages
        for part in (message["content"] if isinstance(message["content"], list) else [])
        if part.get("type") == "image" and isinstance(part.get("url"), Image.Image)
    ]


def with_images(wrapper: Any, request: Instance, pictures: Sequence[Image.Image]) -> tuple[Any, ...]:
    """The request's arguments with other images in the same places."""
    place = _place_of_media(wrapper)
    own: Callable[..., Any] = request.args[place]

    def visuals(doc: Any, *args: Any, **kwargs: Any) -> Any:
        left = list(pictures)
        return [left.pop(0) if isinstance(item, Image.Image) else item for item in own(doc, *args, **kwargs)]

    def messages(doc: Any, *args: Any, **kwargs: Any) -> Any:
        made = own(doc, *args, **kwargs)
        for part, picture in zip(_image_parts(made), pictures, strict=True):
            part["url"] = picture
        return made

    swapped = list(request.args)
    swapped[place] = visuals if getattr(wrapper, "is_simple", True) else messages
    return tuple(swapped)
