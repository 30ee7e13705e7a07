"""The addresses of a host, which no worker of its shall reach."""

from __future__ import annotations

import subprocess

from hayflick_orchestrator.ways_out import own_addresses

TABLE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.77.0.0/24 2 0 2
        |-- 10.77.0.0
           /24 link UNICAST
        |-- 10.77.0.1
           /32 host LOCAL
        |-- 10.77.0.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        +-- 127.0.0.0/31 1 0 0
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
     |-- 172.17.0.1
        /32 host LOCAL
Local:
        |-- 10.77.0.1
           /32 host LOCAL
"""


def test_a_hosts_own_addresses() -> None:
    """Each address of the host is found once; loopback, networks and broadcasts are none."""
    assert own_addresses(TABLE) == ("10.77.0.1", "172.17.0.1")


def test_this_host() -> None:
    """What the kernel's table says of this machine is what ip(8) says."""
    told = subprocess.run(["ip", "-4", "-o", "addr"], check=True, capture_output=True, text=True).stdout
    wanted = {line.split()[3].partition("/")[0] for line in told.splitlines()}
    assert set(own_addresses()) == {one for one in wanted if not one.startswith("127.")}
