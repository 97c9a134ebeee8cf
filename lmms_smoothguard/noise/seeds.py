"""Where a draw begins: its own generator, found by what it is a draw for."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

import torch

Identity = tuple[bytes, int]
"""Of an image or a clip: the digest of its values, and its number among equals in its row."""


def fresh_seed() -> int:
    """Entropy from the operating system, for `seed=None`."""
    return secrets.randbits(63)


def generator_of(seed: int, identity: Identity, number: int) -> torch.Generator:
    """Chance for noisy copy `number`, from 1, of one image or clip."""
    digest, occurrence = identity
    key = b"%d|%b|%d|%d" % (seed, digest, occurrence, number)
    place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(place)


def identify(parts: Iterable[Iterable[torch.Tensor]], rows: tuple[int, ...] | None) -> list[Identity]:
    """Of images or clips, each as its unpadded parts. rows: each one's user row; None where that is not known: equals then share
    their draws."""
    seen: dict[tuple[int, bytes], int] = {}
    identities = []
    for number, unpadded in enumerate(parts):
        hasher = hashlib.blake2b(digest_size=16)
        for part in unpadded:
            hasher.update(repr(tuple(part.shape)).encode())
            hasher.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        digest = hasher.digest()
        occurrence = 0
        if rows is not None:
            place = (rows[number], digest)
            occurrence = seen.get(place, 0)
            seen[place] = occurrence + 1
        identities.append((digest, occurrence))
    return identities
