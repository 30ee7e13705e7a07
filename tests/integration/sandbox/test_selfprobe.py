"""The self-probe in real sandboxes: it finds a whole one whole, and every hole that is made on purpose."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from hayflick_sandbox import grades, landlock, outside, selfprobe, zygote_client
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.messages import Finding, Probed, Ready
from hayflick_sandbox.policy import Limits
from hayflick_sandbox.zygote_client import Started

# By path: tests are no package.
_spec = importlib.util.spec_from_file_location("weakened", Path(__file__).with_name("weakened.py"))
assert _spec is not None
assert _spec.loader is not None
weakened = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weakened)

# Root owns what nobody else may open, in /proc for one.
pytestmark = pytest.mark.root  # who weakens a sandbox must be able to make a whole one

HOST_ROOT = {"own-host-user", "not-host-root", "init-environment", "init-memory"}
HARD_LIMIT_US = 5_000
# These have no weakening of their own: a sandbox without the layer cannot be built at all.
ALWAYS_THERE = {"namespace-user", "namespace-mnt", "namespace-pid", "first-process"}


@pytest.fixture(scope="module")
def house(make_house: Callable[..., AbstractContextManager[Any]]) -> Iterator[Any]:
    """A zygote that leaves out what its policy asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zygote_client, "COMMAND", weakened.COMMAND)
        made = make_house()
        running = made.__enter__()
    try:
        yield running
    finally:
        made.__exit__(None, None, None)


def probed(house: Any, weakening: str, *, uid: int | None = None) -> tuple[Probed, tuple[Finding, ...]]:
    """Start a sandbox, return what is found of it inside and outside, and end it."""
    policy = weakened.policy(weakening)
    name, uid, channel = house.ask(policy, uid=uid)
    started = house.event()
    assert isinstance(started, Started), started
    channel.setblocking(True)
    sandbox = house.sandbox_class(house, name, uid, started.pid, started.pidfd, channel)
    house.live[name] = sandbox
    try:
        found = sandbox.hear(Probed)
        sandbox.hear(Ready)
        seen = outside.observe(sight(house.tree, sandbox, policy.limits))
    finally:
        house.end(sandbox)
    return found, seen


def sight(tree: Tree, sandbox: Any, limits: Limits) -> outside.Sight:
    """Return what a node would look at."""
    return outside.Sight(tree, sandbox.name, sandbox.pid, sandbox.uid, limits, sandbox.listener)


def failed(findings: tuple[Finding, ...]) -> set[str]:
    """Return the names of the checks that did not hold."""
    return {finding.name for finding in findings if not finding.held}


def grade(findings: tuple[Finding, ...]) -> str:
    """Return what *findings* amount to."""
    return grades.judge(grades.criteria(landlock.abi()), findings).grade


@pytest.mark.parametrize("name", sorted(weakened.WEAKENINGS.keys() - {"no-cgroups"}))
def test_each_hole_is_found_and_no_other(house: Any, name: str) -> None:
    """A sandbox without one of its steps fails just the checks of that step, and its grade falls."""
    found, seen = probed(house, name)
    findings = (*found.findings, *seen)
    _, expected = weakened.WEAKENINGS[name]
    assert failed(findings) == expected
    needed = [check.grade for check in (*selfprobe.CHECKS, *outside.CHECKS) if check.name in expected]
    lower = {"": "A", "A": "B", "B": "C", "C": ""}
    assert grade(findings) == lower[min(needed, key="CBA".index, default="")]


def test_every_check_can_fail() -> None:
    """Each check inside has a weakening that it finds, but those without which nothing can be built."""
    found = {name for _, names in weakened.WEAKENINGS.values() for name in names}
    assert found - {"listener"} | ALWAYS_THERE == {check.name for check in selfprobe.CHECKS}


def test_it_takes_moments(house: Any) -> None:
    """The checks take far less than the five milliseconds that they may."""
    assert min(probed(house, "whole")[0].elapsed_us for _ in range(5)) < HARD_LIMIT_US


def test_without_joining_its_cgroups(house: Any) -> None:
    """A sandbox that is in no cgroup of its own is found to be without limits, whatever was written there."""
    legacy = {name for one in house.tree.hierarchies if one.version == 1 for name in one.controllers}
    if not legacy:
        pytest.skip("on version 2 it is born in its cgroup")
    _, seen = probed(house, "no-cgroups")
    names = {"memory": {"memory-limit", "no-swap"}, "cpu": {"cpu-limit"}, "pids": {"pids-limit"}}
    assert failed(seen) == {check for controller in legacy for check in names.get(controller, ())}


def test_limits_are_read_back(house: Any) -> None:
    """Limits in force that are looser than those promised are found to be so."""
    policy = weakened.policy("whole")
    with house.sandbox(policy) as sandbox:
        promised = dataclasses.replace(
            Limits(), memory_bytes=Limits().memory_bytes // 2, cpu_millis=500, pids=8
        )
        promised_sight = sight(house.tree, sandbox, promised)
        names = {"memory-limit", "no-swap", "cpu-limit", "pids-limit"}
        if promised_sight.version("memory") == 2:
            names.discard("no-swap")  # which is none there, whatever was promised
        assert failed(outside.observe(promised_sight)) == names


def test_without_a_unified_hierarchy(house: Any) -> None:
    """Where there is nothing to freeze and kill a family with, that is found."""
    legacy = Tree(house.tree.node, [one for one in house.tree.hierarchies if one.version == 1])
    with house.sandbox(weakened.policy("whole")) as sandbox:
        assert "kill-and-freeze" in failed(outside.observe(sight(legacy, sandbox, Limits())))


@pytest.mark.parametrize(("uid", "expected"), [(99, {"own-host-user"}), (0, HOST_ROOT)])
def test_a_shared_user_is_found(house: Any, uid: int, expected: set[str]) -> None:
    """A sandbox whose user on the host is somebody else's, or root, is found to be so."""
    found, seen = probed(house, "whole", uid=uid)
    assert failed((*found.findings, *seen)) == expected
    assert os.geteuid() == 0
    assert grade((*found.findings, *seen)) == ("" if uid == 0 else "B")
