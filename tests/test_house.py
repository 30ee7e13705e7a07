"""The house's own rules: who may import whom, and what no module may lack.

import-linter checks the layers too; this needs nothing but the syntax trees,
and says which line to change.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from hayflick.v1 import controller_pb2, logger_pb2, orchestrator_pb2, worker_pb2
from hayflick_rpc import access

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "hayflick_rpc": ROOT / "services/hayflick_rpc",
    "hayflick_controller": ROOT / "services/hayflick_controller",
    "hayflick_orchestrator": ROOT / "services/hayflick_orchestrator",
    "hayflick_logger": ROOT / "services/hayflick_logger",
    "hayflick_sandbox": ROOT / "sandbox/hayflick_sandbox",
    "replication": ROOT / "clients/python/replication",
}

# Which of our own packages each may import, besides itself.
DOWN: dict[str, set[str]] = {
    "hayflick_controller": {"hayflick_rpc", "hayflick"},
    "hayflick_orchestrator": {"hayflick_rpc", "hayflick_sandbox", "hayflick"},
    "hayflick_logger": {"hayflick_rpc", "hayflick"},
    "hayflick_rpc": {"hayflick"},
    "hayflick_sandbox": set(),
    "replication": {"hayflick"},
}

# Which other distributions; a package that is not named may import any that
# pyproject declares.
OTHERS: dict[str, set[str]] = {
    "hayflick_sandbox": {"prctl", "_prctl", "pyseccomp"},
    "replication": {"grpc", "grpc_status", "google", "cloudpickle"},
}

OURS = {*PACKAGES, "hayflick"}


def modules(package: str) -> list[Path]:
    """Return every module of *package*."""
    return sorted(PACKAGES[package].rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the top-level name of each absolute import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.lineno, node.module.partition(".")[0]


def violations(package: str, tree: ast.AST, where: str) -> list[str]:
    """Return the imports of *package* that the tables above do not allow."""
    allowed = {package, *DOWN[package]}
    others = OTHERS.get(package)
    found = []
    for line, name in imported(tree):
        if name in OURS:
            wrong = name not in allowed
        else:
            wrong = others is not None and name not in others and name not in sys.stdlib_module_names
        if wrong:
            found.append(f"{where}:{line} {package} may not import {name}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    """Each package imports only what lies below it; services never import each other."""
    found = [
        line
        for path in modules(package)
        for line in violations(package, ast.parse(path.read_text()), str(path.relative_to(ROOT)))
    ]
    assert modules(package), f"no modules in {PACKAGES[package]}"
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("hayflick_controller", "import hayflick_logger.journal"),
        ("hayflick_rpc", "from hayflick_controller import admission"),
        ("hayflick_sandbox", "def later():\n    import grpc"),
        ("hayflick_sandbox", "from hayflick.v1 import errors_pb2"),
        ("replication", "from hayflick_rpc import wire"),
        ("replication", "import sqlalchemy"),
    ],
)
def test_a_planted_violation_is_found(package: str, source: str) -> None:
    """The check sees an import that reaches up or sideways, also inside a function."""
    assert violations(package, ast.parse(source), "planted")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package: str) -> None:
    """No module is without a docstring."""
    silent = [
        str(path.relative_to(ROOT))
        for path in modules(package)
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def methods() -> set[str]:
    """Return the full name of every rpc of every service."""
    found = set()
    for module in (controller_pb2, logger_pb2, orchestrator_pb2, worker_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        found |= {
            f"/{file.package}.{service.name}/{rpc.name}" for service in file.service for rpc in service.method
        }
    return found


def test_every_method_says_who_may_call_it() -> None:
    """The access table names each rpc, and none of ours that does not exist."""
    assert {name for name in access.TABLE if name.startswith("/hayflick.")} == methods()
    assert all(access.TABLE.values())


def test_an_unlisted_method_is_nobodys() -> None:
    """A method that the table does not name is refused to every role."""
    assert not any(
        access.allowed("/hayflick.v1.ControllerService/NoSuchMethod", role) for role in access.Role
    )
