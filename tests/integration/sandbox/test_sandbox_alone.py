"""The sandbox as a command and as a library, without any service; each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _prctl
import prctl
import pyseccomp
import pytest

import hayflick_sandbox

REFUSED = 125


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -m hayflick_sandbox``."""
    return subprocess.run(
        [sys.executable, "-m", "hayflick_sandbox", *arguments],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        timeout=30,
        **options,
    )


def let_go() -> list[str]:
    """Return the layers that this machine lacks and the tests do without."""
    return [name for name in os.environ.get("HAYFLICK_ALLOW_DEGRADED", "").split(",") if name]


def library(code: str) -> Any:
    """Run *code*, with an open session called ``session``, and return what it printed as JSON."""
    program = (
        "import json\n"
        "from hayflick_sandbox.policy import *\n"
        "from hayflick_sandbox.session import *\n"
        "def drop(stream, data): pass\n"
        f"LET_GO = {let_go()!r}\n"
        "with Session.open(allow_degraded=LET_GO) as session:\n"
    ) + textwrap.indent(textwrap.dedent(code), "    ")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_command_runs_inside() -> None:
    """Output, errors and exit code of a command come through, and it runs as the worker."""
    done = command("--", "sh", "-c", "id -u; hostname; pwd; echo error >&2; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, "1000\nworker\n/workspace\n", "error\n")


def test_a_signal_is_told_as_shells_do() -> None:
    """A command that a signal ended gives 128 and the signal."""
    assert command("--", "sh", "-c", "kill -KILL $$").returncode == 128 + 9


@pytest.mark.layers("memory")
def test_want_of_memory_is_told() -> None:
    """A command that was killed for want of memory is told from one that was merely killed."""
    done = command("--memory-mib", "32", "--", "python", "-c", "bytearray(100 << 20)")
    assert done.returncode == 128 + 9
    assert "for want of memory" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory-mib", "1"),
        ("--memory-mib", "-5"),
        ("--cpus", "nan"),
        ("--cpus", "inf"),
        ("--cpus", "0"),
        ("--pids", "0"),
        ("--allow-degraded", "everything"),
        ("--allow-degraded", "seccomp"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    """A limit that is none, or a layer that cannot be let go, is refused by name and nothing runs."""
    done = command(*arguments, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert done.stderr.startswith("hayflick_sandbox: ")
    assert "Traceback" not in done.stderr


def test_the_doctor_reads_this_machine(missing_layers: frozenset[str]) -> None:
    """--doctor tells of each layer, what mends a missing one, and the grade; its status says if all hold."""
    done = command("--doctor")
    lines = done.stdout.splitlines()
    words = [line.split() for line in lines]
    layers = {word[0]: word[1] for word in words if word[1] in ("enforced", "MISSING")}
    assert list(layers) == [
        *("kernel", "namespaces", "uid-range", "memory", "cpu", "pids", "kill", "seccomp"),
        *("tripwire", "landlock", "idmapped-mounts"),
        "launch",
    ]
    assert {name for name, found in layers.items() if found == "MISSING"} == missing_layers
    assert done.returncode == (1 if missing_layers - {"idmapped-mounts"} else 0)
    assert len([line for line in lines if line.lstrip().startswith("→")]) == len(missing_layers)
    assert [line for line in lines if line.startswith("isolation grade: ")]


def test_explain_numbers_the_steps() -> None:
    """--explain prints the confinement as a numbered list, and the system calls when asked."""
    lines = command("--explain").stdout.splitlines()
    assert [int(line.split(".")[0]) for line in lines] == list(range(1, len(lines) + 1))
    assert "seccomp filter" in lines[-1]
    assert "trip namespaces: EPERM, and seen" in command("--explain", "seccomp").stdout


def test_a_callers_umask_does_not_matter() -> None:
    """A caller with the strictest umask gets the same sandbox as any."""
    done = command("--", "sh", "-c", "id -un; echo x > /dev/null", umask=0o777)
    assert (done.returncode, done.stdout, done.stderr) == (0, "worker\n", "")


def test_a_callers_descriptors_stay_outside(tmp_path: Path) -> None:
    """A descriptor that the caller left inheritable is not in the sandbox."""
    (tmp_path / "secret").write_text("secret")
    descriptor = os.open(tmp_path / "secret", os.O_RDONLY)
    done = command("--", "sh", "-c", "ls /proc/self/fd", pass_fds=(descriptor,))
    os.close(descriptor)
    assert done.stdout.split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


@pytest.mark.layers("uid-range")
def test_runs_do_not_see_one_another() -> None:
    """Runs of one session get fresh sandboxes: no file and no uid of the one before."""
    first, second = library(
        """
        texts = []
        script = "ls /tmp /workspace /dev/shm | grep -c x; touch /tmp/x /workspace/x; cat /proc/self/uid_map"
        for _ in range(2):
            said = bytearray()
            session.run(["sh", "-c", script], Policy(), lambda stream, data: said.extend(data))
            texts.append(said.decode().split())
        print(json.dumps(texts))
        """
    )
    assert first[0] == second[0] == "0"
    assert first != second


def test_a_child_that_writes_for_ever_holds_nobody() -> None:
    """A run ends when its command does, though a child of it goes on writing."""
    assert (
        library(
            """
        result = session.run(["sh", "-c", "setsid yes & exit 4"], Policy(), drop)
        print(json.dumps(result.exit_code))
        """
        )
        == 4
    )


def test_a_caller_that_fails_leaves_nothing() -> None:
    """When the caller's sink raises, the sandbox ends, and the session runs the next command."""
    assert (
        library(
            """
        def fail(stream, data):
            raise ArithmeticError
        try:
            session.run(["sh", "-c", "echo x; sleep 1000"], Policy(), fail)
        except ArithmeticError:
            print(json.dumps(session.run(["true"], Policy(), drop).exit_code))
        """
        )
        == 0
    )


def test_a_bad_argv_starts_nothing() -> None:
    """An argv that is empty, too long or holds a NUL is a ValueError."""
    assert (
        library(
            """
        refused = 0
        for argv in ([], ["x" * 70_000], ["x\\0"]):
            try:
                session.run(argv, Policy(), drop)
            except ValueError:
                refused += 1
        print(json.dumps(refused))
        """
        )
        == 3
    )


def test_a_missing_layer_is_refused_unless_let_go() -> None:
    """Opening a session on a machine that lacks a layer raises, and leaves no cgroup behind."""
    program = """
        import hayflick_sandbox.session as module
        from hayflick_sandbox.probe import Layer, LimitNotEnforceable
        import os
        module.probe = lambda tree: (Layer("landlock", False, "the kernel has none", "boot another"),)
        try:
            with module.Session.open():
                print("opened")
        except LimitNotEnforceable as error:
            print(error.layer.name)
        name = f"/session-{os.getpid()}-"
        print(sum(name in path for path, _, _ in os.walk("/sys/fs/cgroup")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == "landlock\n0\n"


def test_at_once() -> None:
    """Eight commands started at once all run: none takes another's uids or cgroups away."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "hayflick_sandbox", "--", "echo", str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    assert [process.communicate(timeout=60) for process in running] == [(f"{n}\n", "") for n in range(8)]


@pytest.mark.layers("uid-range", "memory", "cpu", "pids", "kill", "landlock")
def test_the_pages_example_runs() -> None:
    """The library example of docs/sandbox.md runs as it stands and prints what it should."""
    page = Path(__file__).parents[3] / "docs" / "sandbox.md"
    found = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    done = subprocess.run(
        [sys.executable, "-c", found[1]], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[0] == r"1 b'hello\n'"
    assert done.stdout.splitlines()[1].startswith("0 False ")


SYSTEM_PYTHON = Path("/usr/bin/python3")
NOBODY = 65_534


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Callable[..., Any]]:
    """Run the command as an ordinary user, by an interpreter that such a user can read."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        found = subprocess.run(
            [SYSTEM_PYTHON, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no system Python with venv")
    if found.stdout.strip() != version:
        pytest.skip(f"the system's Python is not {version}, for which python-prctl was built")
    with tempfile.TemporaryDirectory(prefix="sandbox-ordinary-") as directory:
        Path(directory).chmod(0o755)
        home = Path(directory, "venv")
        subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", home], check=True, umask=0o022)
        site = home / "lib" / f"python{version}" / "site-packages"
        for module in (hayflick_sandbox, prctl, _prctl, pyseccomp):
            source = Path(str(module.__file__))
            if source.name == "__init__.py":
                shutil.copytree(source.parent, site / source.parent.name)
            else:
                shutil.copy(source, site)
        subprocess.run(["chmod", "-R", "a+rX", directory], check=True)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [home / "bin" / "python", "-m", "hayflick_sandbox", *arguments],
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
                cwd="/",
                user=NOBODY,
                group=NOBODY,
                extra_groups=[],
            )

        yield run


LET_GO = "uid-range,memory,cpu,pids,kill"


@pytest.mark.root
def test_an_ordinary_user_is_told_what_is_missing(ordinary: Callable[..., Any]) -> None:
    """As an ordinary user nothing runs until the missing layers are let go by name."""
    done = ordinary("--", "echo", "ran")
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert "uid-range" in done.stderr
    assert ordinary("--doctor").returncode == 1


@pytest.mark.root
def test_an_ordinary_user_gets_all_other_layers(ordinary: Callable[..., Any]) -> None:
    """As an ordinary user a command runs without capabilities, filtered, with its address space limited."""
    script = "id -u; ls /proc | grep -vc '[0-9]'; grep -E 'CapBnd|NoNewPrivs|Seccomp_f' /proc/self/status"
    done = ordinary("--allow-degraded", LET_GO, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *("1000", "2", "CapBnd:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp_filters:", "1"),
    ]
    hog = ordinary(
        *("--allow-degraded", LET_GO, "--memory-mib", "64", "--"),
        *("python", "-c", "try: bytearray(1 << 28)\nexcept MemoryError: print('refused')"),
    )
    assert hog.stdout == "refused\n", hog.stderr


@pytest.mark.root
def test_an_ordinary_users_layers_cannot_be_let_go_at_random(ordinary: Callable[..., Any]) -> None:
    """Letting go all but one missing layer is refused for that one."""
    done = ordinary("--allow-degraded", "uid-range,memory,cpu,kill", "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (REFUSED, "")
    assert "pids" in done.stderr


UNDER_A_LISTENER = """
import os, sys
from hayflick_sandbox import notifications, syscalls
import prctl
prctl.set_no_new_privs(1)
listener = syscalls.seccomp_set_mode_filter(notifications._ALLOW_ALL, listener=True)
os.set_inheritable(listener, True)  # somebody must hold it
os.execv(sys.executable, [sys.executable, "-m", "hayflick_sandbox", *sys.argv[1:]])
"""
TRY = "import ctypes; c = ctypes.CDLL(None, use_errno=True); print(c.unshare(0x10000000), ctypes.get_errno())"


def under_a_listener(*arguments: str, also: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command as a container runtime's guest does that has a seccomp listener over it."""
    # newuidmap, a set-user-id program, gives an ordinary user nothing below no_new_privs.
    unmapped = "uid-range" if os.geteuid() else ""
    lacking = [os.environ.get("HAYFLICK_ALLOW_DEGRADED", ""), unmapped, also]
    arguments = ("--allow-degraded", ",".join(filter(None, lacking)), *arguments)
    argv = [sys.executable, "-c", UNDER_A_LISTENER, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.layers("tripwire")
def test_where_no_listener_can_be_had() -> None:
    """Under another's listener the tripwire is missing: refused, or let go and then refusing unseen."""
    done = under_a_listener("--", sys.executable, "-c", TRY)
    assert done.returncode == 125
    assert "tripwire: a container runtime's listener" in done.stderr
    done = under_a_listener("--", sys.executable, "-c", TRY, also="tripwire")
    assert done.stdout == "-1 1\n", done.stderr
    assert "only an attack" not in done.stderr
    assert "tripwire" in under_a_listener("--doctor").stdout


@pytest.mark.layers("tripwire")
def test_what_only_an_attack_asks_for_is_counted() -> None:
    """The command says at its end what it refused that only an attack asks for, by class."""
    done = command("--", sys.executable, "-c", f"{TRY}; c.mount(b'a', b'/tmp', b'tmpfs', 0, None); {TRY}")
    assert done.stdout == "-1 1\n-1 1\n"
    assert "refused what only an attack asks for: mounts 1, namespaces 2" in done.stderr
