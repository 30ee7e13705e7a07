"""Which hosts a worker may reach: names and addresses in one spelling each, and rules over them.

Pure. What is compared is what is dialled: a name is brought into its one
canonical form before any rule sees it, and nothing downstream parses it again.
Everything that could be read in two ways is refused instead of interpreted.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

DEFAULT_PORTS = frozenset({80, 443})
MAX_NAME_CHARS = 253  # RFC 1035, section 2.3.4, less the root's length byte and dot
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
# A name whose last label looks like a number is an IPv4 address to some resolver
# or other: octal, hexadecimal, or with parts left out (WHATWG URL, "ends in a number").
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)

# IANA's special-purpose registries. A version of Python may know fewer of them.
_SPECIAL_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
# All of IPv6 that is routed. Outside it lie loopback, link-local, unique local,
# multicast, and the forms that carry an IPv4 address: mapped, compatible, NAT64.
_ROUTED_6 = ipaddress.IPv6Network("2000::/3")
_SPECIAL_6 = tuple(
    map(
        ipaddress.IPv6Network,
        # The first holds Teredo, ORCHID and their kin; the third is 6to4.
        ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
)


class HostError(ValueError):
    """It is not a host or a rule; the text says why."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of an allow-list.

    Attributes:
        host: A canonical name, or an address.
        below: Whether it stands for the names below ``host`` instead.
        ports: Which ports.
    """

    host: str | Address
    below: bool
    ports: frozenset[int]

    def allows(self, host: str | Address, port: int) -> bool:
        """Return whether it lets a worker reach *host*, in canonical form, at *port*."""
        if port not in self.ports:
            return False
        if self.below:
            return isinstance(host, str) and host.endswith(f".{self.host}")
        return host == self.host

    def text(self) -> tuple[str, ...]:
        """Return the rules that say the same, each as :func:`rule` reads it."""
        name = f"[{self.host}]" if isinstance(self.host, ipaddress.IPv6Address) else str(self.host)
        name = f"*.{name}" if self.below else name
        if self.ports == DEFAULT_PORTS:
            return (name,)
        return tuple(f"{name}:{port}" for port in sorted(self.ports))

    def common(self, other: Rule) -> Rule | None:
        """Return the rule for what both allow; ``None`` when that is nothing."""
        ports = self.ports & other.ports
        if not ports:
            return None
        for one, two in ((self, other), (other, self)):
            if Rule(one.host, one.below, ports).covers(Rule(two.host, two.below, ports)):
                return Rule(two.host, two.below, ports)
        return None

    def covers(self, other: Rule) -> bool:
        """Return whether it allows everything that *other* allows."""
        if not other.ports <= self.ports:
            return False
        if self.below:
            name = other.host
            return isinstance(name, str) and (
                name.endswith(f".{self.host}") or (other.below and name == self.host)
            )
        return not other.below and self.host == other.host


def host(text: str) -> str | Address:
    """Return the one spelling of the host that *text* says.

    Raises:
        HostError: it is none, or not exactly one.
    """
    if text.startswith("[") and text.endswith("]"):
        return _address_6(text[1:-1])
    # An international name is asked for by its A-labels, as every client sends it:
    # which letters look alike, or fold into one another, is not for us to say.
    if not text.isascii():
        raise HostError("an international name must be given by its A-labels (xn--…)")
    name = text.lower()
    name = name.removesuffix(".")
    if len(name) > MAX_NAME_CHARS:
        raise HostError(f"a name has at most {MAX_NAME_CHARS} characters")
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise HostError("a name is made of labels of letters, digits and hyphens")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return ipaddress.IPv4Address(name)
        except ValueError:
            raise HostError("an address must be four decimal numbers without leading zeros") from None
    return name


def _address_6(text: str) -> Address:
    if "%" in text:
        raise HostError("an address with a zone means another host to everybody")
    try:
        return ipaddress.IPv6Address(text)
    except ValueError:
        raise HostError("not an IPv6 address") from None


def host_and_port(text: str) -> tuple[str | Address, int]:
    """Return the host and the port in *text*, "host:port", as an authority has it.

    Raises:
        HostError: it is not exactly that; user information is refused.
    """
    name, colon, number = text.rpartition(":")
    if not colon or not _PORT.fullmatch(number) or int(number) > 65_535:
        raise HostError("a port from 1 to 65535 must follow the host")
    return host(name), int(number)


def rule(text: str) -> Rule:
    """Return the rule that *text* says: "name", "name:port", "*.name", "*.name:port", or with an address.

    Raises:
        HostError: it says none.
    """
    rest = text.removeprefix("*.")
    below = rest != text
    bare = rest.startswith("[") and rest.endswith("]")
    if ":" in rest and not bare:
        name, port = host_and_port(rest)
        ports = frozenset({port})
    else:
        name, ports = host(rest), DEFAULT_PORTS
    if below and not isinstance(name, str):
        raise HostError("there are no names below an address")
    return Rule(name, below, ports)


def rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Return the rules that *texts* say.

    Raises:
        HostError: naming the first that says none.
    """
    found = []
    for text in texts:
        try:
            found.append(rule(text))
        except HostError as error:
            raise HostError(f"{text[:64]!r}: {error}") from None
    return tuple(found)


def covered(narrow: Iterable[Rule], by: Iterable[Rule]) -> bool:
    """Return whether *by* allows all that *narrow* does; two rules may share a host's ports."""
    wide = tuple(by)
    return all(
        any(one.covers(Rule(other.host, other.below, frozenset({port}))) for one in wide)
        for other in narrow
        for port in other.ports
    )


def common(first: Iterable[Rule], second: Iterable[Rule]) -> tuple[str, ...]:
    """Return rules, as texts, for what both lists allow."""
    both = tuple(second)
    found = (one.common(two) for one in first for two in both)
    return tuple(dict.fromkeys(text for shared in found if shared is not None for text in shared.text()))


def is_public(address: Address) -> bool:
    """Return whether *address* is an ordinary host of the internet, in every reading of it."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _SPECIAL_4)
    return address in _ROUTED_6 and not any(address in network for network in _SPECIAL_6)


def refusal(allowed: Iterable[Rule], wanted: str | Address, port: int) -> str:
    """Return why a worker with the rules *allowed* may not ask for *wanted* at *port*; empty when it may.

    An address is allowed by being listed as it is; a name still has to resolve
    to addresses that :func:`may_dial` allows.
    """
    listed = tuple(allowed)
    if any(one.allows(wanted, port) for one in listed):
        return ""
    if any(one.allows(wanted, other) for one in listed for other in one.ports):
        return "port_not_allowed"
    return "host_not_allowed" if isinstance(wanted, str) else "address_not_allowed"


def may_dial(allowed: Iterable[Rule], address: Address, port: int) -> bool:
    """Return whether *address*, which an allowed name resolved to, may be dialled.

    Public ones may; all others only where the very address is listed.
    """
    return is_public(address) or any(one.allows(address, port) for one in allowed)


__all__ = [
    "Address",
    "HostError",
    "Rule",
    "common",
    "covered",
    "host",
    "host_and_port",
    "is_public",
    "may_dial",
    "refusal",
    "rule",
    "rules",
]
