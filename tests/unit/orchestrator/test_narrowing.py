"""A child's kernel facts against its parent's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_orchestrator import kernel_facts
from hayflick_orchestrator.narrowing import KernelFacts, widening

FACTS = KernelFacts(
    cgroup={"memory": 2**26, "cpu": 50_000, "pids": None},
    rlimits={"Max open files": 256, "Max cpu time": None},
    capabilities={"CapEff": 0, "CapBnd": 0b101},
    no_new_privs=True,
    seccomp_mode=2,
    seccomp_filters=1,
    interfaces=frozenset({"lo"}),
    licences=frozenset({"inet"}),
    sizes={"tmp_bytes": 100, "cpu_time_seconds": None},
)
limits = st.none() | st.integers(0, 3)
tables = st.fixed_dictionaries({"a": limits, "b": limits})
names = st.frozensets(st.sampled_from(["lo", "eth0", "inet"]))
facts = st.builds(
    KernelFacts,
    cgroup=tables,
    rlimits=tables,
    capabilities=st.fixed_dictionaries({"CapEff": st.integers(0, 7), "CapBnd": st.integers(0, 7)}),
    no_new_privs=st.booleans(),
    seccomp_mode=st.integers(0, 2),
    seccomp_filters=st.integers(0, 2),
    interfaces=names,
    licences=names,
    sizes=tables,
)


@pytest.mark.parametrize(
    ("field", "limit", "wider"),
    [
        ("cgroup.memory", "67108864", {"cgroup": {**FACTS.cgroup, "memory": 2**26 + 1}}),
        ("cgroup.cpu", "50000", {"cgroup": {**FACTS.cgroup, "cpu": None}}),
        ("cgroup.memory", "67108864", {"cgroup": {}}),
        ("rlimit.Max open files", "256", {"rlimits": {"Max open files": 257}}),
        ("size.tmp_bytes", "100", {"sizes": {"tmp_bytes": 101}}),
        ("CapEff", "0000000000000000", {"capabilities": {"CapEff": 1}}),
        ("CapBnd", "0000000000000005", {"capabilities": {"CapBnd": 0b111}}),
        ("NoNewPrivs", "1", {"no_new_privs": False}),
        ("Seccomp", "2", {"seccomp_mode": 0}),
        ("Seccomp_filters", "1", {"seccomp_filters": 0}),
        ("seccomp.more", "refused", {"licences": frozenset({"inet", "more"})}),
        ("net.eth0", "absent or down", {"interfaces": frozenset({"lo", "eth0"})}),
    ],
)
def test_each_widening_is_found(field: str, limit: str, wider: dict[str, Any]) -> None:
    """Whatever a child has more of than its parent is named, with what the parent has."""
    assert widening(replace(FACTS, **wider), FACTS) == (field, limit)


def test_the_same_and_less_are_narrow_enough() -> None:
    """A child may have all that its parent has, and less of anything."""
    assert widening(FACTS, FACTS) is None
    less = replace(
        FACTS,
        cgroup={"memory": 1, "cpu": 1, "pids": 1},
        rlimits={"Max open files": 1, "Max cpu time": 1},
        capabilities={"CapEff": 0, "CapBnd": 0b100},
        seccomp_filters=2,
        interfaces=frozenset(),
        licences=frozenset(),
        sizes={"tmp_bytes": 0, "cpu_time_seconds": 3},
    )
    assert widening(less, FACTS) is None
    assert widening(FACTS, less) is not None


@given(facts, facts, facts)
def test_generations_only_narrow(child: KernelFacts, parent: KernelFacts, grandparent: KernelFacts) -> None:
    """What is no wider than its parent is no wider than its parent's parent."""
    assert widening(child, child) is None
    if widening(child, parent) is None and widening(parent, grandparent) is None:
        assert widening(child, grandparent) is None


def test_the_kernels_own_table_of_limits_is_read() -> None:
    """Each row of /proc/PID/limits gives its hard limit under its name."""
    read = kernel_facts.rlimits(Path("/proc/self/limits").read_text())
    assert len(read) == 16
    assert {"Max open files", "Max cpu time", "Max nice priority", "Max realtime timeout"} <= set(read)


DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs
    lo:       0       0    0    0    0     0          0         0        0       0    0
  eth0:       0       0    0    0    0     0          0         0        0       0    0
"""


def test_a_loopback_that_is_down_is_no_way_out() -> None:
    """Interfaces count as they are listed, the loopback only once it has its address."""
    assert kernel_facts.interfaces(DEV, "") == {"eth0"}
    assert kernel_facts.interfaces(DEV, "Local:\n  |-- 127.0.0.1\n     /32 host LOCAL\n") == {"eth0", "lo"}
