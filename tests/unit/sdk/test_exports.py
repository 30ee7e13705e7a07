"""What the package offers, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import replication

PUBLIC_MODULES = [
    "contract",
    "controller",
    "errors",
    "observability",
    "orchestrator",
    "signer",
    "testing",
    "worker",
]

# The names that users were promised.
PROMISED = {
    "Controller", "Manifest", "Metric", "NetworkPolicy", "Predicate", "RegistryEntry", "ReplicationContext",
    "ReplicationContract", "ReplicationDenied", "ResourceSpec", "SandboxOrchestrator", "ContainerRecord",
    "StopCondition", "StructuredLogger", "Worker", "WorkerState",
}  # fmt: skip


def modules_after(statement: str) -> set[str]:
    """Return what a fresh interpreter has loaded after *statement*."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(ran.stdout))


def test_all_is_sorted_and_every_name_is_there() -> None:
    """__all__ is in order, each name of it resolves, and nothing promised is missing."""
    assert replication.__all__ == sorted(replication.__all__)
    assert set(replication.__all__) >= PROMISED
    for name in replication.__all__:
        assert getattr(replication, name) is not None
    assert set(replication.__all__) <= set(dir(replication))


def test_every_public_name_of_every_public_module_is_exported() -> None:
    """What a module offers, the package offers: the same object."""
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(f"replication.{module_name}")
        assert module.__all__ == sorted(module.__all__)
        for name in module.__all__:
            if module_name != "testing" and inspect.isclass(getattr(module, name)):
                assert getattr(replication, name) is getattr(module, name)


def test_a_name_that_is_not_offered_is_an_attribute_error() -> None:
    """Lazy import does not make every name seem to be there."""
    with pytest.raises(AttributeError, match="nonsense"):
        replication.nonsense  # noqa: B018 -- the access is the test


@pytest.mark.parametrize(
    "statement",
    [
        "import replication",
        "import replication.contract",
        "import replication.errors",
        "import replication.worker",
        "import replication.signer",
        "import replication._inside",
        "import replication._supervisor",
        "from replication import Worker, Manifest, ReplicationDenied, ReplicationContract",
    ],
)
def test_what_a_sandbox_imports_brings_neither_grpc_nor_protobuf(statement: str) -> None:
    """Every worker pays for these imports, and none of them for gRPC."""
    heavy = {"grpc", "google", "hayflick", "sqlalchemy", "hayflick_rpc", "hayflick_sandbox", "asyncio"}
    assert not {name.partition(".")[0] for name in modules_after(statement)} & heavy


def imported_by(path: Path) -> set[str]:
    """Return the modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_the_package_imports_only_what_it_may() -> None:
    """The SDK knows the standard library, gRPC, protobuf, the wire and cloudpickle."""
    allowed = {*sys.stdlib_module_names, "replication", "grpc", "google", "cloudpickle"}
    for path in Path(replication.__file__).parent.rglob("*.py"):
        for name in imported_by(path):
            top, _, rest = name.partition(".")
            assert top in allowed or (top == "hayflick" and rest == "v1"), f"{path.name} imports {name}"
