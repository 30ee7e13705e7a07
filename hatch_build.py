"""Build hook: make the gRPC stubs from ``protos/`` before every install.

The stubs are not committed, so an sdist, a wheel and an editable install all
come through here. ``python hatch_build.py`` does the same by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, where hatchling is not needed
    BuildHookInterface = object  # type: ignore[assignment,misc]

STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def make_stubs(root: Path) -> list[Path]:
    """Run protoc over every proto below *root*/protos; return the stubs made.

    Raises:
        subprocess.CalledProcessError: protoc refused a proto; its own words
            are on standard error.
    """
    source = root / "protos"
    protos = sorted(path.relative_to(source) for path in source.rglob("*.proto"))
    # protoc finds the mypy plug-in on PATH; in an isolated build it lies
    # beside this interpreter's scripts, or in the overlay that pip made.
    scripts = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    scripts += [str(Path(entry).parents[2] / "bin") for entry in sys.path if entry.endswith("site-packages")]
    subprocess.run(
        [
            sys.executable,
            *("-m", "grpc_tools.protoc", "-I."),
            *("--python_out=.", "--grpc_python_out=."),
            *("--mypy_out=quiet:.", "--mypy_grpc_out=quiet:."),
            *map(str, protos),
        ],
        cwd=source,
        env={**os.environ, "PATH": os.pathsep.join(scripts)},
        check=True,
    )
    stems = [source / proto.with_suffix("") for proto in protos]
    return [stem.with_name(stem.name + suffix) for stem in stems for suffix in STUB_SUFFIXES]


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc,unused-ignore]
    """Called by hatchling before each build of a wheel or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the stubs and name them as files that git ignores but we ship."""
        del version
        root = Path(self.root)
        build_data["artifacts"] += [f"/{path.relative_to(root)}" for path in make_stubs(root)]


if __name__ == "__main__":
    for stub in make_stubs(Path(__file__).parent):
        print(stub)
