"""What the sandbox imports, because it is in the memory of every worker."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hayflick_sandbox

PACKAGE = Path(hayflick_sandbox.__file__).parent
ALLOWED = {*sys.stdlib_module_names, "prctl", "pyseccomp", "hayflick_sandbox"}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_standard_library_and_two_more(path: Path) -> None:
    """Each module imports the standard library, python-prctl, pyseccomp and its own package alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [node.module or ""]
        assert {name.partition(".")[0] for name in names} <= ALLOWED


def loaded(module: str) -> set[str]:
    """Return what a fresh interpreter has loaded after importing *module*."""
    code = f"import sys, {module}; import json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], check=True, stdout=subprocess.PIPE, cwd="/")
    return set(json.loads(done.stdout))


def test_the_zygote_stays_small() -> None:
    """The zygote loads nothing that starts threads, talks to networks or holds secrets."""
    modules = loaded("hayflick_sandbox.zygote")
    assert "hayflick_sandbox.init" in modules
    unwanted = {
        *("grpc", "google", "cloudpickle", "replication", "sqlalchemy", "cryptography", "hayflick"),
        *("ssl", "_ssl", "asyncio", "subprocess", "multiprocessing", "concurrent", "sqlite3", "logging"),
        *("hayflick_rpc", "hayflick_controller", "hayflick_orchestrator", "urllib.request", "http"),
    }
    assert modules & unwanted == set()
    outside = {name.partition(".")[0] for name in modules} - ALLOWED - {"_prctl", "__main__"}
    # Site hooks of the environment may load before any of ours.
    assert outside <= {name.partition(".")[0] for name in loaded("sys")}
