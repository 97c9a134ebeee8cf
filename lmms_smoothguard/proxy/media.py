"""The media of a request: decoded within bounds, noised, encoded again. Every copy, the clean one too, is what we decoded."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import re
import warnings
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from PIL import Image, ImageOps

from lmms_smoothguard.blackbox.pictures import NoisyPictures
from lmms_smoothguard.blackbox.sounds import NoisyClips
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.files import whole_pictures
from lmms_smoothguard.proxy.chat import ChatRequest, Part
from lmms_smoothguard.proxy.refusals import Refusal, bad_request
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.sounds import Clip, read_clip

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?P<parameters>(?:;[\w.+-]+=[\w.+-]+)*);base64,", re.ASCII)
Fetch = Callable[[str], Awaitable[bytes]]
"""What an http(s) address holds."""


async def gather_data(request: ChatRequest, settings: ProxySettings, fetch: Fetch) -> list[bytes]:
    """The files of a request's media. Raises Refusal for too many, broken base64, and addresses that are not allowed."""
    if len(request.media) > settings.most_media:
        raise bad_request(
            f"the request has {len(request.media)} pictures and sounds; expected at most {settings.most_media}"
        )
    return await asyncio.gather(*(_data(part, settings, fetch) for part in request.media))


async def _data(part: Part, settings: ProxySettings, fetch: Fetch) -> bytes:
    where = f"part {part.place} of message {part.message}"
    if part.kind == "input_audio":
        return _decoded(part.value["data"], where)
    url: str = part.value["url"]
    if url[:5].lower() == "data:":
        found = _DATA.match(url)
        if found is None or not (found["type"] or "image/").startswith("image/"):
            raise bad_request(f"{where} has a data address that is no picture; expected data:image/png;base64,...")
        return _decoded(url[found.end() :], where)
    if not settings.remote:
        raise bad_request(
            f"{where} points at {url[:80]!r}; expected a data: address. The operator can allow others: smoothguard proxy --remote"
        )
    return await fetch(url)


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{where} is no valid base64 ({error}); expected it whole, without line breaks") from error


def read_picture(data: bytes, most_pixels: int) -> Image.Image:
    """RGB, turned as its orientation says. Raises Refusal for what is no whole still picture of at most so many pixels, which is seen
    before they are decoded."""
    try:
        with warnings.catch_warnings(), whole_pictures():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound comes first
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                width, height = picture.size
                if width * height > most_pixels:
                    raise Refusal(
                        413, "too_large", f"a picture has {width} x {height} pixels; expected at most {most_pixels}"
                    )
                if getattr(picture, "is_animated", False):  # n_frames would walk through all of a GIF's frames
                    raise bad_request("a picture has 2 frames or more; expected a still one")
                return ImageOps.exif_transpose(picture).convert("RGB")
    except Refusal:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large("far too many", most_pixels) from error
    except Exception as error:  # broken EXIF raises struct.error, TypeError, AttributeError and what else there is
        raise bad_request(f"a picture cannot be read ({error}); expected PNG, JPEG, WebP, GIF or BMP, whole") from error


def _too_large(size: str, most: int) -> Refusal:
    return Refusal(
        413,
        "too_large",
        f"a picture has {size} pixels; expected at most {most}, those of the request's other pictures counted",
    )


class NoisyMedia:
    """The media of one request, and noisy copies of them as the engine takes them."""

    def __init__(self, request: ChatRequest, data: Sequence[bytes], settings: ProxySettings) -> None:
        """Raises Refusal for media that cannot be read or defended."""
        self._request, self._settings = request, settings
        defense = settings.defense
        found = list(zip(request.media, data, strict=True))
        pictures: list[Image.Image] = []
        for part, held in found:
            if part.kind == "image_url":
                left = settings.most_pixels - sum(picture.width * picture.height for picture in pictures)
                pictures.append(settings.sight.of(read_picture(held, left)))
        clips = [self._clip(held) for part, held in found if part.kind == "input_audio"]
        self.pixels = sum(picture.width * picture.height for picture in pictures)
        self._pictures = NoisyPictures(pictures, defense.sigma, defense.seed)
        self._clips = NoisyClips(clips, settings.audio_sigma or 0.0, defense.seed)

    def _clip(self, data: bytes) -> Clip:
        if self._settings.audio_sigma is None:
            raise bad_request("the request has sound; expected pictures alone, unless the operator gives --audio-sigma")
        try:
            return read_clip(data, self._settings.longest_sound)
        except ConfigError as error:
            raise bad_request(str(error)) from error

    def body(self, copy: int) -> bytes:
        """What the engine is asked for copy `copy`, from 0; the first is the clean one where the defence has one."""
        number = copy if self._settings.defense.include_clean else copy + 1
        pictures = iter(self._pictures.copy(number) if number else self._pictures.clean)
        clips = iter(self._clips.copy(number) if number else self._clips.clean)
        values = [
            _image_value(next(pictures), part) if part.kind == "image_url" else _audio_value(next(clips))
            for part in self._request.media
        ]
        return json.dumps(self._request.with_media(values)).encode()


def _image_value(picture: Image.Image, part: Part) -> dict[str, Any]:
    written = io.BytesIO()
    picture.save(written, "PNG", compress_level=0)  # noise does not compress
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
    # "low" has an API shrink the picture, which averages the noise away; "auto" leaves it the choice.
    return {"url": url, "detail": "high"} if "detail" in part.value else {"url": url}


def _audio_value(clip: Clip) -> dict[str, Any]:
    return {"data": base64.b64encode(clip.wav).decode("ascii"), "format": "wav"}
