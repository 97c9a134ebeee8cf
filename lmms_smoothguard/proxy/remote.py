"""Fetches pictures by their address, from public networks alone."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import httpx

from lmms_smoothguard.proxy.refusals import Refusal, bad_request

_SECONDS = 20.0


async def fetch_public(url: str, most_bytes: int) -> bytes:
    """What an http(s) address holds.

    The name is resolved once, every address it has must be public, and the connection goes to one of these: a name that changes
    its mind in between leads nowhere else. Redirects are not followed. Raises Refusal for anything else, and for more than
    `most_bytes`.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise bad_request(
            f"a picture's address is {url[:80]!r}; expected http(s)://host/path without a user, or data:image/..."
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise bad_request(f"a picture's address is {url[:80]!r}, whose port is none") from error
    address = await _public_address(parts.hostname, port)
    host = f"[{address}]" if ":" in address else address
    target = httpx.URL(url).copy_with(host=host.strip("[]"), port=port)
    headers = {"host": parts.netloc, "accept": "image/*"}
    extensions = {"sni_hostname": parts.hostname}
    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=_SECONDS) as client,
            client.stream("GET", target, headers=headers, extensions=extensions) as response,
        ):
            if response.status_code != 200:
                raise bad_request(
                    f"a picture's address answered {response.status_code}; expected 200 (redirects are not followed)"
                )
            found = bytearray()
            async for chunk in response.aiter_bytes():
                found += chunk
                if len(found) > most_bytes:
                    raise Refusal(413, "too_large", f"a picture's address holds more than {most_bytes} bytes")
            return bytes(found)
    except httpx.HTTPError as error:
        raise bad_request(f"a picture's address cannot be read ({type(error).__name__})") from error


async def _public_address(host: str, port: int) -> str:
    """Raises Refusal where any address of the name is private, local, reserved or otherwise not of the public network."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise bad_request(f"a picture's address names {host!r}, which cannot be found") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not _is_public(address):
            raise Refusal(
                403, "private_address", f"a picture's address leads to {host!r}, which is not on the public network"
            )
    return addresses[0]


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)
