"""What a proxy is told: which engine, which defence, which bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from urllib.parse import urlsplit

from lmms_smoothguard.blackbox.config import check_outside
from lmms_smoothguard.blackbox.pictures import Sight
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError

MEGABYTE = 2**20
_OWN_SIZE = Sight()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """upstream: the engine's address, such as http://127.0.0.1:8000 (with or without /v1).

    defense: carried out from outside, so at answer level, in pixel space; its seed is None unless measurements are repeated.
    sight: the size at which the model looks at pictures; they are brought to it before the noise.
    audio_sigma: noise of sounds, in amplitude (full scale 1); None refuses requests with sound.
    quorum: answers that must come, of the defence's num_samples; None for more than half.
    timeout: seconds an attempt at one copy may take; retries: further attempts; pause: seconds before the first of these,
        doubled for each further one.
    most_requests: defended requests in work at a time, beyond them 503; most_upstream: calls of the engine at a time, further ones wait.
    most_bytes: of a request's body; most_pixels: of a request's pictures together; most_pixels_in_work: of all requests in work, beyond them
        503; most_media: pictures and sounds in a request; longest_sound: seconds.
    remote: whether http(s) addresses of pictures are fetched, never from private networks.
    extra_fields: names of a request's fields, beyond the known ones, that the engine may be given.
    """

    upstream: str
    defense: SmoothGuardConfig
    sight: Sight = _OWN_SIZE
    audio_sigma: float | None = None
    quorum: int | None = None
    timeout: float = 120.0
    retries: int = 2
    pause: float = 0.25
    most_requests: int = 64
    most_upstream: int = 128
    most_bytes: int = 32 * MEGABYTE
    most_pixels: int = 32_000_000
    most_pixels_in_work: int = 64_000_000
    most_media: int = 16
    longest_sound: float = 600.0
    remote: bool = False
    extra_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_outside(self.defense)
        address = urlsplit(self.upstream)
        if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
            raise ConfigError(f"upstream is {self.upstream!r}; expected an address such as http://127.0.0.1:8000/v1")
        if address.username or address.password:
            raise ConfigError("upstream has a user or password in its address; expected none: keys travel in headers")
        for name in (
            "most_requests",
            "most_upstream",
            "most_bytes",
            "most_pixels",
            "most_pixels_in_work",
            "most_media",
        ):
            _whole(name, getattr(self, name), 1)
        _whole("retries", self.retries, 0)
        for name in ("timeout", "longest_sound"):
            _positive(name, getattr(self, name))
        if not 0 <= self.pause < math.inf:
            raise ConfigError(f"pause is {self.pause!r}; expected seconds, 0 or more")
        if self.audio_sigma is not None and not 0 < self.audio_sigma <= 1:
            raise ConfigError(f"audio_sigma is {self.audio_sigma!r}; expected more than 0 and at most 1 (full scale)")
        copies = self.defense.num_samples
        if self.quorum is not None and not (isinstance(self.quorum, int) and copies < 2 * self.quorum <= 2 * copies):
            raise ConfigError(
                f"quorum is {self.quorum!r}; expected more than half of num_samples {copies}, and at most all of them"
            )

    @property
    def needed(self) -> int:
        """Answers that must come."""
        return self.quorum or self.defense.num_samples // 2 + 1

    @property
    def base(self) -> str:
        """The engine's address, ending in /v1."""
        return self.upstream.rstrip("/").removesuffix("/v1") + "/v1"


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}")


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}; expected a number above 0")
