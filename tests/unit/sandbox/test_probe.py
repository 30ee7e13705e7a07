"""Refuse rather than pretend: what is missing is refused unless it was let go by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayflick_sandbox import probe
from hayflick_sandbox.cgroups import Hierarchy, Tree
from hayflick_sandbox.probe import INDISPENSABLE, Layer, LimitNotEnforceable, require

NAMES = ("kernel", "namespaces", "uid-range", "memory", "cpu", "pids", "kill", "seccomp", "landlock")


def layers(missing: set[str] = frozenset()) -> tuple[Layer, ...]:  # type: ignore[assignment]
    """Return all layers, those in *missing* not enforced."""
    return tuple(Layer(name, name not in missing, "found", "mend") for name in NAMES)


@given(st.sets(st.sampled_from(NAMES)), st.sets(st.sampled_from(NAMES)))
def test_require(missing: set[str], allowed: set[str]) -> None:
    """What is missing is returned when it was let go, refused when it was not, and three never can be."""
    if allowed & INDISPENSABLE:
        with pytest.raises(ValueError, match=r"^allow_degraded: "):
            require(layers(missing), allowed)
    elif missing <= allowed:
        assert set(require(layers(missing), allowed)) == missing
    else:
        with pytest.raises(LimitNotEnforceable, match="mend") as caught:
            require(layers(missing), allowed)
        assert caught.value.layer.name in missing - allowed


def test_unknown_names_are_refused() -> None:
    """Letting go what is no layer is an error, and so is an empty name."""
    for name in ("memroy", "", "*", "all"):
        with pytest.raises(ValueError, match=r"^allow_degraded: "):
            require(layers(), [name])


@pytest.mark.parametrize("name", sorted(INDISPENSABLE))
def test_the_indispensable_cannot_be_let_go(name: str) -> None:
    """Without kernel, namespaces or seccomp there is no sandbox, on any machine."""
    with pytest.raises(ValueError, match=name):
        require(layers(), [name])


@pytest.mark.parametrize(
    ("release", "enough"),
    [
        ("6.18.44-fc-v669", True),
        ("5.14.0", True),
        ("5.13.19-generic", False),
        ("4.18.0-553.el8.x86_64", False),
        ("6.8-rc1", True),
        ("6.1+", True),
        ("10.0", True),
        ("odd", False),
    ],
)
def test_kernel_releases(release: str, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of writing a kernel's release is understood, and one that is not is too old."""
    monkeypatch.setattr("platform.release", lambda: release)
    layer = probe._kernel()
    assert layer.enforced is enough
    assert bool(layer.remedy) is not enough


@pytest.mark.parametrize(
    ("text", "enough"),
    [
        ("         0          0 4294967295\n", True),
        ("0 1000 1\n", False),
        ("0 100000 65536\n", False),
        ("0 100000 65536\n1879048192 1879048192 8388608\n", True),
        ("0 0 2147483647\n", True),
        ("", False),
    ],
)
def test_a_range_must_be_mapped(text: str, enough: bool, tmp_path: Path) -> None:
    """Root in a user namespace without our uids does not count as having them."""
    (tmp_path / "uid_map").write_text(text)
    assert probe._maps(str(tmp_path / "uid_map")) is enough


def cgroup_layers(tree: Tree) -> dict[str, Layer]:
    """Return the layers that the cgroups give, by name."""
    return {layer.name: layer for layer in probe._cgroups(tree)}


def test_a_version_1_host(tmp_path: Path) -> None:
    """A host with version 1 alone enforces the limits and not the kill in one write."""
    found = cgroup_layers(Tree("node", [Hierarchy(tmp_path, 1, frozenset({"memory", "cpu", "pids"}))]))
    assert {name for name, layer in found.items() if not layer.enforced} == {"kill"}
    assert found["kill"].remedy


def test_a_host_without_cgroups() -> None:
    """A host without cgroups enforces none of the four, and each has a remedy."""
    found = cgroup_layers(Tree("node", []))
    assert set(found) == {"memory", "cpu", "pids", "kill"}
    assert not any(layer.enforced for layer in found.values())
    assert all(layer.remedy for layer in found.values())


@pytest.mark.parametrize(("version", "limit"), [(1, "memory.memsw.limit_in_bytes"), (2, "memory.swap.max")])
def test_swap_that_cannot_be_limited(
    version: int, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not count as enforced where swap is on and cannot be limited."""
    swaps = "Filename Type Size Used Priority\n/dev/vdb partition 1 0 -2\n"
    monkeypatch.setattr(probe, "_text", lambda path: swaps if path == "/proc/swaps" else "")
    tree = Tree("node", [Hierarchy(tmp_path, version, frozenset({"memory"}))])
    node = tree.roots[tmp_path]
    node.mkdir(parents=True)
    assert not cgroup_layers(tree)["memory"].enforced
    (node / limit).touch()
    assert cgroup_layers(tree)["memory"].enforced
    swaps = "Filename Type Size Used Priority\n"
    (node / limit).unlink()
    assert cgroup_layers(tree)["memory"].enforced
