"""``python -m hayflick_sandbox``: explain the confinement, examine the machine, run a command."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys

from hayflick_sandbox import explain
from hayflick_sandbox.cgroups import Tree
from hayflick_sandbox.controllers import io_layer
from hayflick_sandbox.doctor import examine, grade
from hayflick_sandbox.identities import IdentitiesExhausted
from hayflick_sandbox.policy import MIB, Limits, Policy
from hayflick_sandbox.probe import GRADED, LimitNotEnforceable, probe, require
from hayflick_sandbox.session import SandboxFailed, Session
from hayflick_sandbox.zygote_client import ZygoteDied

EXIT_REFUSED = 125  # as env(1) and its kin: the command did not run


def main(argv: list[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    arguments = _parser().parse_args(argv)
    os.umask(0o022)  # else an ordinary user could not enter the cgroups that it makes
    allowed = [name for name in arguments.allow_degraded.split(",") if name]
    try:
        limits = Limits(
            memory_bytes=arguments.memory_mib * MIB,
            cpu_millis=round(arguments.cpus * 1_000),
            pids=arguments.pids,
        )
        policy = Policy(limits, loopback=arguments.loopback)
        if arguments.explain == "seccomp":
            print("\n".join(explain.system_calls()))
            return 0
        if arguments.explain or arguments.doctor:
            return _examine(policy, allowed, doctor=arguments.doctor)
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        if not command:
            _parser().error("a command is missing: python -m hayflick_sandbox -- CMD")
        with Session.open(allow_degraded=allowed) as session:
            result = session.run(command, policy, _copy)
    except (
        *(LimitNotEnforceable, SandboxFailed, ZygoteDied, IdentitiesExhausted),
        *(ValueError, OverflowError, OSError),
    ) as error:
        print(f"hayflick_sandbox: {error}", file=sys.stderr)
        return EXIT_REFUSED
    if result.oom_killed:
        print("hayflick_sandbox: a process was killed for want of memory", file=sys.stderr)
    if result.denials:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(result.denials.items()))
        print(f"hayflick_sandbox: refused what only an attack asks for: {counts}", file=sys.stderr)
    return 128 + result.signal if result.signal is not None else result.exit_code or 0


def _examine(policy: Policy, allowed: list[str], *, doctor: bool) -> int:
    if doctor:
        layers = examine()
        print("\n".join(explain.table(layers)))
        with contextlib.closing(Tree.create(f"probe-{os.getpid()}-{secrets.token_hex(4)}")) as tree:
            print(f"  beside the layers: {io_layer(tree).detail}")
        print(explain.grades(*grade(layers)))
        return 0 if all(layer.enforced or layer.name in GRADED for layer in layers) else 1
    tree = Tree.create(f"probe-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        layers = probe(tree)
    finally:
        tree.close()
    degraded = frozenset(require(layers, allowed))
    for number, line in enumerate(explain.confinement(policy, degraded), 1):
        print(f"{number:>3}. {line}")
    return 0


def _copy(stream: int, data: bytes) -> None:
    while data:
        data = data[os.write(stream, data) :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hayflick_sandbox", description=__doc__)
    parser.add_argument(
        "--explain", nargs="?", const="steps", choices=("steps", "seccomp"), help="print the confinement"
    )
    parser.add_argument("--doctor", action="store_true", help="print what this machine can enforce")
    parser.add_argument("--memory-mib", type=int, default=256, help="memory limit in MiB")
    parser.add_argument("--cpus", type=float, default=1.0, help="CPU bandwidth in CPUs")
    parser.add_argument("--pids", type=int, default=128, help="processes and threads at once")
    parser.add_argument("--loopback", action="store_true", help="bring up the sandbox's own loopback")
    parser.add_argument(
        "--allow-degraded",
        default=os.environ.get("HAYFLICK_ALLOW_DEGRADED", ""),
        help="layers to do without where this machine lacks them, separated by commas",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- CMD: run CMD in a fresh sandbox")
    return parser


if __name__ == "__main__":
    sys.exit(main())
