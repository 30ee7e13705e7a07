"""Hosts and rules over them: one spelling each, and nothing that could be read twice."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_rpc import hosts
from hayflick_rpc.hosts import HostError

OK = hosts.rules(["ok.com", "*.wide.org", "10.0.0.7:8080", "[fd00::7]:8080", "xn--bcher-kva.example"])

# What a worker may try, by what it must come to: a refusal's verdict, or "malformed".
TRICKS = [
    # allowed, in every harmless spelling
    ("ok.com:443", ""),
    ("OK.Com:80", ""),
    ("ok.com.:443", ""),
    ("a.wide.org:443", ""),
    ("a.b.WIDE.org.:443", ""),
    ("xn--bcher-kva.example:443", ""),
    ("bücher.example:443", "malformed"),
    ("10.0.0.7:8080", ""),
    ("[fd00::7]:8080", ""),
    ("[FD00:0:0::7]:8080", ""),
    # names that only look allowed
    ("evil.com:443", "host_not_allowed"),
    ("ok.com.evil.com:443", "host_not_allowed"),
    ("notok.com:443", "host_not_allowed"),
    ("sub.ok.com:443", "host_not_allowed"),
    ("wide.org:443", "host_not_allowed"),
    ("evilwide.org:443", "host_not_allowed"),
    ("оk.com:443", "malformed"),  # noqa: RUF001 -- a Cyrillic o
    ("localhost:443", "host_not_allowed"),
    # ports
    ("ok.com:22", "port_not_allowed"),
    ("ok.com:8080", "port_not_allowed"),
    ("10.0.0.7:443", "port_not_allowed"),
    # things in names that some parser or resolver drops
    ("evil.com\0.ok.com:443", "malformed"),
    ("ok.com\0.evil.com:443", "malformed"),
    ("ok.com@evil.com:443", "malformed"),
    ("evil.com@ok.com:443", "malformed"),
    ("user:pass@ok.com:443", "malformed"),
    ("ok.com%00.evil.com:443", "malformed"),
    ("ok%2ecom:443", "malformed"),
    ("ok.com\r\nHost: evil.com:443", "malformed"),
    ("ok.com\t:443", "malformed"),
    (" ok.com:443", "malformed"),
    ("ok.com..:443", "malformed"),
    (".ok.com:443", "malformed"),
    ("ok..com:443", "malformed"),
    ("-ok.com:443", "malformed"),
    ("ok.com/:443", "malformed"),
    ("ok.com#:443", "malformed"),
    ("ok.com\\evil.com:443", "malformed"),
    ("*.wide.org:443", "malformed"),
    ("a" * 64 + ".com:443", "malformed"),
    (".".join(["a" * 60] * 5) + ":443", "malformed"),
    ("bü" * 200 + ":443", "malformed"),
    (":443", "malformed"),
    ("", "malformed"),
    # ports in other spellings
    ("ok.com", "malformed"),
    ("ok.com:", "malformed"),
    ("ok.com:0", "malformed"),
    ("ok.com:0443", "malformed"),
    ("ok.com:+443", "malformed"),
    ("ok.com:65979", "malformed"),  # 443 + 65536
    ("ok.com:443x", "malformed"),
    ("ok.com:４４３", "malformed"),  # noqa: RUF001 -- fullwidth digits
    ("ok.com:443:443", "malformed"),
    # addresses in every spelling
    ("127.0.0.1:443", "address_not_allowed"),
    ("169.254.169.254:80", "address_not_allowed"),
    ("93.184.216.34:443", "address_not_allowed"),
    ("[::1]:443", "address_not_allowed"),
    ("[::]:443", "address_not_allowed"),
    ("[fd00:ec2::254]:80", "address_not_allowed"),
    ("[::ffff:10.0.0.7]:8080", "address_not_allowed"),
    ("[::10.0.0.7]:8080", "address_not_allowed"),
    ("[64:ff9b::10.0.0.7]:8080", "address_not_allowed"),
    ("[2002:a00:7::]:8080", "address_not_allowed"),
    ("10.0.0.7.:8080", ""),
    ("１０.0.0.7:8080", "malformed"),  # noqa: RUF001 -- fullwidth digits
    ("2130706433:443", "malformed"),
    ("0x7f000001:443", "malformed"),
    ("0x7f.1:443", "malformed"),
    ("0177.0.0.1:443", "malformed"),
    ("010.0.0.7:8080", "malformed"),
    ("10.7:8080", "malformed"),
    ("127.1:443", "malformed"),
    ("10.0.0.0x7:8080", "malformed"),
    ("10.0.0.7.0:8080", "malformed"),
    ("1.2.3.4.5:443", "malformed"),
    ("evil.0x:443", "malformed"),
    ("[fe80::1%eth0]:443", "malformed"),
    ("[fd00::7%1]:8080", "malformed"),
    ("[10.0.0.7]:8080", "malformed"),
    ("fd00::7:8080", "malformed"),
    ("[fd00::7:8080", "malformed"),
    ("[v1.x]:443", "malformed"),
]


@pytest.mark.parametrize(("asked", "verdict"), TRICKS, ids=[repr(asked[:40]) for asked, _ in TRICKS])
def test_tricks(asked: str, verdict: str) -> None:
    """What is allowed is allowed in each spelling of it, and everything else in none."""
    try:
        name, port = hosts.host_and_port(asked)
    except HostError:
        assert verdict == "malformed"
    else:
        assert hosts.refusal(OK, name, port) == verdict


def test_an_empty_list_allows_nothing() -> None:
    """Without rules nothing may be reached, by name or by address."""
    for asked in ("ok.com:443", "localhost:80", "8.8.8.8:443", "[2606:4700::1]:443"):
        assert hosts.refusal((), *hosts.host_and_port(asked))


PRIVATE = [
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1"),
    *("172.31.255.255", "192.0.0.1", "192.168.1.1", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1"),
    *("255.255.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.1", "192.88.99.1"),
    *("::", "::1", "fe80::1", "fd00:ec2::254", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
    *("::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2001::1"),
    *("2001:db8::1", "100::1", "fec0::1", "3fff::1", "2001:10::1", "5f00::1"),
]


@pytest.mark.parametrize("text", PRIVATE)
def test_what_is_not_the_internet(text: str) -> None:
    """No address of a machine, a link, a site, a group, or one that carries another in it is public."""
    address = ipaddress.ip_address(text)
    assert not hosts.is_public(address)
    listed = hosts.rules([f"[{text}]:81" if address.version == 6 else f"{text}:81", "ok.com"])
    assert hosts.may_dial(listed, address, 81)
    assert not hosts.may_dial(listed, address, 443)
    assert not hosts.may_dial(OK, address, 443)


@pytest.mark.parametrize("text", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450::1"])
def test_what_is(text: str) -> None:
    """Ordinary addresses may be dialled when an allowed name resolves to them."""
    assert hosts.is_public(ipaddress.ip_address(text))


addresses = st.ip_addresses()


@given(addresses)
def test_public_is_never_wider_than_the_library_says(address: hosts.Address) -> None:
    """Nothing counts as public that Python's own table does not count as global."""
    if hosts.is_public(address):
        assert address.is_global
        assert not address.is_multicast


@given(st.text(max_size=80))
def test_any_text(text: str) -> None:
    """Any text is a host or a HostError; a host's spelling is the only one that it has."""
    try:
        name = hosts.host(text)
    except HostError:
        return
    if isinstance(name, str):
        assert hosts.host(name) == name == name.lower()
        assert name.isascii()
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789.-_")


labels = st.sampled_from(["a", "b", "ok", "com", "org"])
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
ports = st.sampled_from(["", ":443", ":80", ":8443"])
some_rules = st.lists(
    st.builds(lambda star, name, port: star + name + port, st.sampled_from(["", "*."]), names, ports),
    max_size=5,
).map(hosts.rules)


@given(some_rules, some_rules, names, st.sampled_from([80, 443, 8443]))
def test_what_is_covered_is_allowed(
    narrow: tuple[hosts.Rule, ...], wide: tuple[hosts.Rule, ...], name: str, port: int
) -> None:
    """Where one list covers another, whatever the other allows, it allows too."""
    if hosts.covered(narrow, by=wide) and not hosts.refusal(narrow, name, port):
        assert not hosts.refusal(wide, name, port)


@given(some_rules)
def test_a_list_covers_itself(listed: tuple[hosts.Rule, ...]) -> None:
    """Every list covers itself and the empty one; the empty one covers nothing but itself."""
    assert hosts.covered(listed, by=listed)
    assert hosts.covered((), by=listed)
    assert hosts.covered(listed, by=()) == (not listed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "*.*.com",
        "a*.com",
        "*.10.0.0.7",
        "*.[::1]",
        "::1",
        "http://ok.com",
        "ok.com:0",
        "ok.com:*",
    ],
)
def test_what_is_no_rule(text: str) -> None:
    """A rule that could mean more than it says is refused."""
    with pytest.raises(HostError):
        hosts.rule(text)
