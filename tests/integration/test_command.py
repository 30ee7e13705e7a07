"""The ``hayflick`` command as operators type it: keys, and what this machine can enforce."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hayflick.v1 import controller_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping


def hayflick(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    argv = [sys.executable, "-m", "hayflick_cli", *map(str, arguments)]
    env: Mapping[str, str] = {**os.environ, **environment}
    return subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False, env=env)


def keys(stack: Any, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a verb of ``hayflick keys``."""
    return hayflick("keys", *arguments, "--controller", stack.address("controller"), **environment)


def states(stack: Any, contract_id: str) -> list[str]:
    """Return the states of a contract's keys, newest first, as the command lists them."""
    done = keys(stack, "list", "--contract", contract_id)
    assert done.returncode == 0, done.stderr
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert {line[1] for line in lines} == {contract_id}
    return [line[2].split()[0] for line in lines]


def current(stack: Any, contract_id: str) -> str:
    """Return the id of the key that signs for a contract."""
    request = controller_pb2.GetContractRequest(contract_id=contract_id)
    return str(stack.controller.GetContract(request).contract.key_id)


def test_keys_are_listed_rotated_and_revoked(stack: Any) -> None:
    """Each verb does what it says to the one contract that it names, and says which key signs now."""
    contract, other = stack.contract(), stack.contract()
    first = current(stack, contract)
    done = keys(stack, "rotate", contract, "--reason", "due")
    assert done.returncode == 0, done.stderr
    second = current(stack, contract)
    assert done.stdout == f"{second} signs the manifests of {contract} from now on\n"
    assert second != first
    assert states(stack, contract) == ["current", "retired"]
    done = keys(stack, "revoke", second, "--reason", "leaked")
    assert done.stdout == f"{second} is revoked\n{current(stack, contract)} took its place\n"
    assert states(stack, contract) == ["current", "revoked", "retired"]
    assert states(stack, other) == ["current"]


def test_what_is_not_there_ends_with_status_2(stack: Any) -> None:
    """An unknown contract, an unknown key and a controller that is not there are failures, said plainly."""
    for arguments in (("rotate", "nobody", "--reason", "x"), ("revoke", "nothing", "--reason", "x")):
        done = keys(stack, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("hayflick: ")
    done = hayflick("keys", "list", "--controller", f"unix://{stack.directory}/nobody.sock")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_a_secret_comes_from_a_file_or_the_environment(stack: Any, tmp_path: Path) -> None:
    """The secret that is given is taken from where only this user can read it, and never from an argument."""
    contract = stack.contract()
    secret = tmp_path / "secret"
    secret.write_text("a-secret-of-the-operator\n")
    secret.chmod(0o640)
    done = keys(stack, "rotate", contract, "--reason", "due", "--secret-file", secret)
    assert (done.returncode, "mode 0600" in done.stderr) == (2, True)
    secret.chmod(0o600)
    done = keys(stack, "rotate", contract, "--reason", "due", "--secret-file", secret)
    assert done.returncode == 0, done.stderr
    done = keys(stack, "rotate", contract, "--reason", "due", "--secret-variable", "S", S="another-secret")
    assert done.returncode == 0, done.stderr
    done = keys(stack, "rotate", contract, "--reason", "due", "--secret-variable", "UNSET_HERE")
    assert (done.returncode, "UNSET_HERE" in done.stderr) == (2, True)
    assert states(stack, contract) == ["current", "retired", "retired"]
    secret.write_text("short\n")
    done = keys(stack, "rotate", contract, "--reason", "due", "--secret-file", secret)
    assert (done.returncode, "secret" in done.stderr) == (2, True)


def test_a_revocation_whose_answer_was_not_heard_is_asked_again(own_stack: Any) -> None:
    """Without a logger the command says that it cannot know, and how to ask for the same once more."""
    contract = own_stack.contract()
    key = current(own_stack, contract)
    own_stack.processes["logger"].send_signal(signal.SIGSTOP)
    try:
        done = keys(own_stack, "revoke", key, "--reason", "leaked")
    finally:
        own_stack.processes["logger"].send_signal(signal.SIGCONT)
    assert done.returncode == 2
    again = done.stderr.partition("--request-id ")[2].strip(")\n")
    done = keys(own_stack, "revoke", key, "--reason", "leaked", "--request-id", again)
    assert done.stdout.startswith(f"{key} is revoked\n"), done.stderr
    assert states(own_stack, contract) == ["current", "revoked"]


@pytest.mark.parametrize("arguments", [(), ("--help",), ("audit",), ("keys", "--help")])
def test_help_names_the_verbs(arguments: tuple[str, ...]) -> None:
    """Whoever types the bare command, or asks for help, is told the verbs."""
    done = hayflick(*arguments)
    assert "Usage: hayflick" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_what_holds_here() -> None:
    """The table names every layer of the sandbox; the status says whether a sandbox can be had."""
    done = hayflick("doctor")
    assert done.returncode in (0, 1)
    for layer in ("namespaces", "seccomp", "landlock", "memory", "tripwire"):
        assert layer in done.stdout
