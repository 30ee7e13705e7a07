"""What a client of the proxy asks for, from its first bytes: HTTP CONNECT, plain HTTP, or SOCKS5.

HTTP is read by h11, which refuses what two readers could read differently.
SOCKS5 (RFC 1928) is read here: its server side is four fixed messages.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import h11

from hayflick_rpc.hosts import Address, HostError, host, host_and_port

if TYPE_CHECKING:
    import asyncio

MAX_HEAD_BYTES = 16 * 1024
READ_BYTES = 64 * 1024

SOCKS_VERSION = 5
_NO_AUTHENTICATION, _NO_METHOD = 0, 0xFF
_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4
SOCKS_DONE, SOCKS_REFUSED, SOCKS_UNREACHABLE, SOCKS_NO_COMMAND = 0, 2, 4, 7

# What is between one client and its proxy (RFC 9110, section 7.6.1), and what we write anew.
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"upgrade"),
        *(b"proxy-authorization", b"proxy-authenticate", b"host", b"expect"),
    }
)


class BadRequest(Exception):
    """It is not a request that this proxy takes; the text is for the client."""


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A connection that is passed on as it is.

    Attributes:
        early: What the client sent behind its request already.
    """

    host: str | Address
    port: int
    early: bytes
    socks: bool


@dataclass(frozen=True, slots=True)
class Plain:
    """One HTTP request that is passed on, and its answer back."""

    host: str | Address
    port: int
    head: h11.Request
    client: h11.Connection


Wanted: TypeAlias = Tunnel | Plain


async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Wanted | None:
    """Return what the client asks for; ``None`` when it left without a word.

    Raises:
        BadRequest: it asks for nothing that this proxy does.
        EOFError: it left in the middle.
    """
    first = await reader.read(1)
    if not first:
        return None
    if first[0] == SOCKS_VERSION:
        return await _read_socks(reader, writer)
    return await _read_http(first, reader)


async def _read_socks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Tunnel:
    (count,) = await reader.readexactly(1)
    if _NO_AUTHENTICATION not in await reader.readexactly(count):
        writer.write(bytes((SOCKS_VERSION, _NO_METHOD)))
        raise BadRequest("socks")
    writer.write(bytes((SOCKS_VERSION, _NO_AUTHENTICATION)))
    version, command, _, kind = await reader.readexactly(4)
    if version != SOCKS_VERSION or command != _CONNECT:
        writer.write(socks_answer(SOCKS_NO_COMMAND))
        raise BadRequest("socks")
    try:
        wanted: str | Address
        if kind == _IPV4:
            wanted = ipaddress.IPv4Address(await reader.readexactly(4))
        elif kind == _IPV6:
            wanted = ipaddress.IPv6Address(await reader.readexactly(16))
        elif kind == _NAME:
            (length,) = await reader.readexactly(1)
            wanted = host((await reader.readexactly(length)).decode("utf-8"))
        else:
            raise HostError("no such kind of address")
        port = int.from_bytes(await reader.readexactly(2), "big")
        if not port:
            raise HostError("no such port")
    except (HostError, UnicodeDecodeError):
        writer.write(socks_answer(SOCKS_REFUSED))
        raise BadRequest("host") from None
    return Tunnel(wanted, port, b"", socks=True)


def socks_answer(code: int) -> bytes:
    """Return a SOCKS5 reply; the address in it is of no use to anybody."""
    return bytes((SOCKS_VERSION, code, 0, _IPV4)) + bytes(6)


async def _read_http(first: bytes, reader: asyncio.StreamReader) -> Wanted:
    client = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    client.receive_data(first)
    try:
        while not isinstance(event := client.next_event(), h11.Request):
            if event is not h11.NEED_DATA:
                raise EOFError
            client.receive_data(await reader.read(READ_BYTES))
    except h11.RemoteProtocolError as error:
        raise BadRequest("http") from error
    try:
        target = event.target.decode("ascii")
        if event.method == b"CONNECT":
            name, port = host_and_port(target)
            # Whatever h11 has read beyond the head belongs to the tunnel.
            early, _ = client.trailing_data
            return Tunnel(name, port, early, socks=False)
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() != "http":
            raise BadRequest("target")
        authority, path = _split(rest)
        name, port = host_and_port(authority if _has_port(authority) else f"{authority}:80")
    except (HostError, UnicodeDecodeError):
        raise BadRequest("host") from None
    headers = [(b"Host", authority.encode())]
    headers += [
        (key, value)
        for key, value in event.headers
        if key not in _HOP_BY_HOP and key not in _named_in_connection(event)
    ]
    headers.append((b"Connection", b"close"))
    head = h11.Request(method=event.method, target=path, headers=headers)
    return Plain(name, port, head, client)


def _split(rest: str) -> tuple[str, str]:
    """Return the authority, and the path and query as the server shall see them."""
    cut = next((at for at, character in enumerate(rest) if character in "/?#"), len(rest))
    path = rest[cut:].partition("#")[0]
    return rest[:cut], path if path.startswith("/") else f"/{path}"


def _has_port(authority: str) -> bool:
    return ":" in authority.rpartition("]")[2]


def _named_in_connection(request: h11.Request) -> set[bytes]:
    named: set[bytes] = set()
    for key, value in request.headers:
        if key == b"connection":
            named |= {token.strip().lower() for token in value.split(b",")}
    return named - {b"content-length", b"transfer-encoding"}
