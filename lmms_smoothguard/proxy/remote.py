"""Fetches pictures by their address, from public networks alone."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx

from lmms_smoothguard.proxy.refusals import Refusal, bad_request

_SECONDS = 20.0
"""Of a whole fetch, its name's resolution included: a time for every read alone would let a host that drips hold its place for ever."""
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_OF_CLOUDS = frozenset(map(ipaddress.ip_address, ("168.63.129.16", "192.0.0.192")))
"""Where Azure's host agent and Oracle's metadata answer to the machines of these clouds, among addresses that are public elsewhere."""


async def fetch_public(url: str, most_bytes: int) -> bytes:
    """What an http(s) address holds.

    The name is resolved once, every address it has must be public, and the connection goes to one of these: a name that changes
    its mind in between leads nowhere else. Redirects are not followed. Raises Refusal for anything else, for what comes compressed,
    for more than `most_bytes`, and for what takes too long.
    """
    try:
        async with asyncio.timeout(_SECONDS):
            return await _fetch(url, most_bytes)
    except TimeoutError as error:
        raise bad_request(
            f"a picture's address is {url[:80]!r}, which took too long; expected the whole picture within {_SECONDS:g} seconds. "
            "Send it as data:image/... instead"
        ) from error
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _no_address(url) from error
    except httpx.HTTPError as error:
        raise bad_request(f"a picture's address cannot be read ({type(error).__name__})") from error


async def _fetch(url: str, most_bytes: int) -> bytes:
    parsed = httpx.URL(url)
    if parsed.scheme not in ("http", "https") or not parsed.raw_host or parsed.userinfo:
        raise _no_address(url)
    port = (443 if parsed.scheme == "https" else 80) if parsed.port is None else parsed.port
    if not 0 < port < 2**16:
        raise _no_address(url)
    host = parsed.raw_host.decode("ascii")
    target = parsed.copy_with(host=await _public_address(host, port), port=port)
    # What is compressed could be inflated to any size before it is counted.
    headers = {"host": parsed.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"}
    async with (
        httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=None) as client,
        client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200:
            raise bad_request(
                f"a picture's address answered {response.status_code}; expected 200 (redirects are not followed)"
            )
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise bad_request(
                f"a picture's address answered with content-encoding {encoding[:80]!r}; expected the picture as it is, "
                "without one. Send it as data:image/... instead"
            )
        found = bytearray()
        async for chunk in response.aiter_raw():
            found += chunk
            if len(found) > most_bytes:
                raise Refusal(413, "too_large", f"a picture's address holds more than {most_bytes} bytes")
        return bytes(found)


def _no_address(url: str) -> Refusal:
    return bad_request(
        f"a picture's address is {url[:80]!r}; expected http(s)://host/path without a user, with a port from 1 to 65535 if any, "
        "at most 65536 characters long, or data:image/..."
    )


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
    if isinstance(found, ipaddress.IPv6Address):
        # Outside of 2000::/3 kernels and gateways make IPv4 addresses of them (::127.0.0.1, NAT64's 64:ff9b::7f00:1), or sites have
        # networks of their own. Within it 6to4 does so; Teredo's are not global to begin with.
        inner = found.sixtofour
        if found not in _GLOBAL_UNICAST or (inner is not None and not _is_public(str(inner))):
            return False
    return found.is_global and not found.is_multicast and found not in _OF_CLOUDS
