"""Where attacks run: workers launched through real services, whole or deliberately weakened."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import pyseccomp

from ..integration.conftest import MIB, PYTHON, Ran, Stack, duration, request_id, shell, until
from . import tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from hayflick.v1.orchestrator_pb2 import Sandbox, Task
    from hayflick.v1.resources_pb2 import Worker

    from .table import Row
    from .tools import Facts, Verdict

from hayflick.v1 import orchestrator_pb2 as opb
from hayflick.v1.resources_pb2 import NetworkPolicy
from hayflick_cli.log_source import load_key, open_source
from hayflick_tlog.verify import verify_log

WEAK = Path(__file__).with_name("weak")
TURNED = Path(__file__).parents[1] / "integration/yes_controller.py"
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
ATTACK_SECONDS = 15.0
ENVIRONMENT_CANARY = "canary-of-the-environment"


class Grounds:
    """Things of the host that attacks look for: files, sockets and ports, all made by the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.canary = directory / "canary"
        self.canary.mkdir(mode=0o755)
        for name in ("secret", "journal", "scratch"):
            (self.canary / name).write_text("canary\n")
        (self.canary / "scratch").chmod(0o666)
        self.abstract = f"hayflick-escape-{secrets.token_hex(6)}"
        self._sockets = [self._listen(socket.AF_INET, ("127.0.0.1", 0))]
        self._sockets.append(self._listen(socket.AF_UNIX, "\0" + self.abstract))
        path = str(self.canary / "open.sock")
        self._sockets.append(self._listen(socket.AF_UNIX, path))
        Path(path).chmod(0o777)
        os.mkfifo(self.canary / "pipe")
        (self.canary / "pipe").chmod(0o666)
        # Whoever opens it for writing finds a reader.
        self._reader = os.open(self.canary / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        if os.geteuid() == 0:
            os.mknod(self.canary / "null", stat.S_IFCHR, os.makedev(1, 3))
            (self.canary / "null").chmod(0o666)

    @staticmethod
    def _listen(family: int, address: Any) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.bind(address)
        sock.listen(16)
        return sock

    def facts(self) -> Facts:
        """Return what attacks know beforehand."""
        numbers = {}
        for name in SYSCALLS:
            with contextlib.suppress(ValueError):
                numbers[name] = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        services = ("controller", "orchestrator", "logger")
        canary = str(self.canary)
        return {
            "numbers": numbers,
            "rootless": os.geteuid() != 0,
            "nonce": f"escape-{secrets.token_hex(6)}",
            "namespaces": {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in NAMESPACES},
            "root_device": os.stat("/").st_dev,
            "python": sys.executable,
            "python_prefix": sys.base_prefix,
            "cores_are_piped": Path("/proc/sys/kernel/core_pattern").read_text().startswith("|"),
            "directory": str(self.directory),
            "secrets": [*(f"{self.directory}/{name}" for name in services), f"{canary}/secret"],
            "special_files": f"{self.directory}/canary",
            "sockets": [*(f"{self.directory}/{name}.sock" for name in services), f"{canary}/open.sock"],
            "records": [f"{self.directory}/logger", f"{canary}/journal"],
            "tcp_port": self._sockets[0].getsockname()[1],
            "abstract": self.abstract,
            # The same start for all, so that the host's table can be searched for it.
            "ipc_key": 0x4859_0000 | secrets.randbelow(1 << 16),
            "environment_canary": ENVIRONMENT_CANARY,
            "licensed_variables": [],
        }

    def close(self) -> None:
        """Stop listening."""
        os.close(self._reader)
        for sock in self._sockets:
            sock.close()


SYSCALLS = (
    *(
        "acct",
        "add_key",
        "bpf",
        "clock_settime",
        "clone",
        "clone3",
        "delete_module",
        "fanotify_init",
        "finit_module",
    ),
    *(
        "fsopen",
        "fspick",
        "getpid",
        "init_module",
        "io_uring_enter",
        "io_uring_register",
        "io_uring_setup",
        "ioctl",
    ),
    *(
        "ioperm",
        "iopl",
        "kcmp",
        "kexec_file_load",
        "kexec_load",
        "keyctl",
        "lookup_dcookie",
        "modify_ldt",
        "mount",
    ),
    *(
        "mount_setattr",
        "move_mount",
        "mq_open",
        "msgget",
        "name_to_handle_at",
        "open_by_handle_at",
        "open_tree",
    ),
    *(
        "perf_event_open",
        "personality",
        "pidfd_getfd",
        "pivot_root",
        "prlimit64",
        "process_madvise",
        "chroot",
    ),
    *(
        "process_vm_readv",
        "process_vm_writev",
        "ptrace",
        "quotactl",
        "reboot",
        "request_key",
        "seccomp",
        "semget",
    ),
    *(
        "sethostname",
        "setns",
        "settimeofday",
        "shmget",
        "socket",
        "socketpair",
        "swapoff",
        "swapon",
        "syslog",
    ),
    *("umount2", "unshare", "userfaultfd", "vhangup"),
)


class WeakStack(Stack):
    """A stack whose orchestrator a test can weaken."""

    def program(self, name: str) -> list[str]:
        """Return what of Python is run for a service."""
        if name == "orchestrator":
            return [str(WEAK / "orchestrator.py"), str(self.directory)]
        return super().program(name)


class TurnedStack(Stack):
    """A stack whose controller allows everything."""

    def program(self, name: str) -> list[str]:
        """Return what of Python is run for a service."""
        return [str(TURNED)] if name == "controller" else super().program(name)


class TurnedWeakStack(TurnedStack, WeakStack):
    """Both."""


class Arena:
    """A running stack, and attacks in its workers."""

    def __init__(self, stack: Stack, grounds: Grounds) -> None:
        self.stack = stack
        self.facts = grounds.facts()
        self._launched: list[Worker] = []
        self._nonces: list[str] = []
        self._streams: list[Any] = []  # hanging up would end the task

    @property
    def weak(self) -> bool:
        """Whether walls can be taken away here."""
        return isinstance(self.stack, WeakStack)

    def weaken(self, words: Sequence[str]) -> None:
        """Take away the walls that *words* name, for what is launched from now on."""
        assert self.weak or not words
        if self.weak:
            (self.stack.directory / "weakening.json").write_text(json.dumps(sorted(words)))

    def launch(
        self,
        words: Sequence[str] = (),
        *,
        contract_id: str | None = None,
        parent_id: str = "",
        **resources: Any,
    ) -> Worker:
        """Return a new worker, weakened by *words*; a weakened one only with the outer wall in place."""
        self.weaken(words)
        wanted = {"memory_limit_bytes": 128 * MIB, "network": NetworkPolicy(), **resources}
        if isinstance(wanted["network"], dict):
            wanted["network"] = NetworkPolicy(**wanted["network"])
        worker = self.stack.launch(contract_id, parent_id, **wanted)
        self._launched.append(worker)
        self._check_outer_wall(self.sandbox(worker))
        return worker

    def _check_outer_wall(self, sandbox: Sandbox) -> None:
        """Assert what no weakening may take: the user and mount namespaces, and not being root."""
        proc = Path(f"/proc/{sandbox.host_pid}")
        # To an ordinary user the namespaces of others are closed; whatever fell, that is all they are.
        for kind in ("user", "mnt") if os.geteuid() == 0 else ():
            assert (proc / "ns" / kind).stat().st_ino != self.facts["namespaces"][kind], (
                "the outer wall is gone"
            )
        # By the map itself and not by /proc/…/status, which is of the moment.
        outside = (proc / "uid_map").read_text().split()
        mine = os.geteuid() != 0 and int(outside[1]) == os.geteuid()
        assert mine or int(outside[1]) >= 100_000, "the outer wall is gone"

    def sandbox(self, worker: Worker) -> Sandbox:
        """Return a live worker's sandbox."""
        return self.stack.sandboxes()[worker.worker_id]

    def clear(self) -> None:
        """End what was launched."""
        self.weaken(())
        for nonce in self._nonces:
            for pid in self._called(nonce):
                self.signal(pid, signal.SIGKILL)
        self._nonces.clear()
        for stream in self._streams:
            stream.cancel()
        self._streams.clear()
        live = self.stack.sandboxes()
        for worker in self._launched:
            if worker.worker_id in live:
                self.stack.stop(worker)
        self._launched.clear()

    def run(self, worker: Worker, function: Callable[[Any], Any]) -> Ran:
        """Run a Python callable in a worker."""
        return self.stack.run(worker, task_of(function), keep=True)

    def begin(self, worker: Worker, function: Callable[[Any], Any]) -> None:
        """Start a Python callable that stays, and return once it printed something."""
        self._streams.append(self.stack.begin(worker, task_of(function)))

    @staticmethod
    def task(function: Callable[[Any], Any]) -> Task:
        """Return a task that calls *function*."""
        return task_of(function)

    @staticmethod
    def task_of_shell(script: str) -> Task:
        """Return a task that runs a shell script."""
        return shell(script)

    def shell(self, worker: Worker, script: str, timeout_seconds: float | None = None) -> Ran:
        """Run a shell script in a worker."""
        return self.stack.run(worker, shell(script, timeout_seconds), keep=True)

    def attack(
        self, worker: Worker, attacks: Mapping[str, Callable[[Facts], Verdict]], more: Facts
    ) -> dict[str, Verdict]:
        """Run attacks in a worker, each in a process of its own; return the verdicts by name."""
        facts = {**self.facts, **more}
        ran = self.run(worker, batch(dict(attacks), facts))
        assert ran.outcome == "SUCCEEDED", (ran.result, ran.stderr)
        verdicts: dict[str, Verdict] = json.loads(ran.result.value_json)
        return verdicts

    def stop_within(self, worker: Worker, *, grace_seconds: float, deadline_seconds: float) -> None:
        """Stop a worker, with a grace, or give up."""
        request = opb.StopWorkerRequest(
            request_id=request_id(), worker_id=worker.worker_id, grace=duration(grace_seconds)
        )
        self.stack.orchestrator.StopWorker(request, timeout=deadline_seconds)

    def put(self, worker: Worker, path: str, data: bytes) -> None:
        """Write a file into a worker's workspace."""
        self.stack.orchestrator.PutFile(
            iter(
                (
                    opb.PutFileRequest(header=opb.PutFileHeader(worker_id=worker.worker_id, path=path)),
                    opb.PutFileRequest(data=data),
                    opb.PutFileRequest(summary=opb.FileSummary(size_bytes=len(data))),
                )
            )
        )

    def get(self, worker: Worker, path: str) -> bytes:
        """Read a file from a worker's workspace."""
        request = opb.GetFileRequest(worker_id=worker.worker_id, path=path)
        return b"".join(one.data for one in self.stack.orchestrator.GetFile(request))

    @property
    def kills(self) -> bool:
        """Whether this node can kill a control group."""
        layers = self.stack.orchestrator.GetNode(opb.GetNodeRequest()).layers
        return any(layer.name == "kill" and layer.enforced for layer in layers)

    def log_with(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Return every event of the record, with its source, once one is *wanted*.

        Read as a stranger would, from the log's files and by its public key: a log that
        is not the one that was signed fails the test.
        """

        def read() -> list[dict[str, Any]] | None:
            events: list[dict[str, Any]] = []

            def take(_: int, entry: bytes) -> None:
                parsed = json.loads(entry)
                events.append({"details": {}, **parsed["event"], "source": parsed["source"]})

            directory = self.stack.directory / "logger"
            key = load_key(str(directory / "log.pub"))
            with open_source(str(directory)) as source:
                try:
                    finding = verify_log(source.read, source.checkpoint, key, on_entry=take)
                except FileNotFoundError:
                    return None  # a partial tile that has grown since the checkpoint was read
            if not finding.intact:
                return None  # read while it was written; if it stays so, time runs out
            return events if any(map(wanted, events)) else None

        found: list[dict[str, Any]] = until(read)
        return found

    # Processes of ours on the host, by the name that their worker gave them

    def nonce(self) -> str:
        """Return a name that no other process has; whoever bears it in the end is killed."""
        self._nonces.append(f"escape-{secrets.token_hex(8)}")
        return self._nonces[-1]

    @staticmethod
    def _called(nonce: str) -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if (entry / "cmdline").read_bytes().startswith(nonce.encode() + b"\0"):
                        found.append(int(entry.name))
        return found

    def called(self, nonce: str, count: int) -> list[int]:
        """Return the host pids of the processes called *nonce*, once there are *count*."""
        until(lambda: len(self._called(nonce)) == count)
        return self._called(nonce)

    def gone(self, nonce: str, seconds: float) -> list[int]:
        """Return who is called *nonce* and still there after *seconds* at most."""
        deadline = time.monotonic() + seconds
        while (left := self._called(nonce)) and time.monotonic() < deadline:
            time.sleep(0.01)  # nothing tells of the end of a stranger's process
        return left

    @staticmethod
    def signal(pid: int, number: int) -> None:
        """Signal a process of ours that may be gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    @contextlib.contextmanager
    def another(self, words: Sequence[str] = (), *, turned: bool = False, **settings: str) -> Iterator[Arena]:
        """Give an arena of the same kind, started weakened, whose services may be killed."""
        with running_arena(weak=self.weak, words=words, turned=turned, **settings) as other:
            yield other


@contextlib.contextmanager
def running_arena(
    *, weak: bool, words: Sequence[str] = (), turned: bool = False, **settings: str
) -> Iterator[Arena]:
    """Run a stack in a directory of its own, and what attacks look for.

    Args:
        weak: Whether walls can be taken away.
        words: What is taken away already when the orchestrator starts.
        turned: Whether its controller allows everything.
        settings: Of the orchestrator.
    """
    options = {name.replace("_", "-"): value for name, value in settings.items()}
    with tempfile.TemporaryDirectory(prefix="hayflick-") as name, contextlib.ExitStack() as undo:
        directory = Path(name)
        grounds = Grounds(directory)
        undo.callback(grounds.close)
        os.environ["SECRET_TOKEN"] = ENVIRONMENT_CANARY
        undo.callback(os.environ.pop, "SECRET_TOKEN", None)
        if weak:
            (directory / "weakening.json").write_text(json.dumps(sorted(words)))
        if weak:
            undo.callback(end_survivors, directory)
        kind = (TurnedWeakStack if weak else TurnedStack) if turned else (WeakStack if weak else Stack)
        stack = kind(directory, orchestrator=options)
        undo.callback(stack.close)
        arena = Arena(stack, grounds)
        undo.callback(arena.clear)
        yield arena


def end_survivors(directory: Path) -> None:
    """End what a weak zygote of *directory* forked and what outlived it, as some weakenings have it.

    Control groups would end it, where an ordinary user has any.
    """
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                if words[-2:] == [os.fsencode(WEAK / "zygote.py"), os.fsencode(directory)]:
                    os.kill(int(entry.name), signal.SIGKILL)


def task_of(function: Callable[[Any], Any]) -> Task:
    """Return a task that calls *function*, with all of ours that it uses by value."""
    ours = [module for name, module in list(sys.modules.items()) if name.startswith(__package__ or "?")]
    for module in ours:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickled = cloudpickle.dumps(function)
    finally:
        for module in ours:
            cloudpickle.unregister_pickle_by_value(module)
    return opb.Task(python=opb.PythonCallable(pickled=pickled, python_version=PYTHON))


def batch(
    attacks: dict[str, Callable[[Facts], Verdict]], facts: Facts
) -> Callable[[Any], dict[str, Verdict]]:
    """Return a task that runs *attacks* one after the other, each in a process of its own."""
    limit_seconds = ATTACK_SECONDS

    def run(me: Any) -> dict[str, Verdict]:
        import json
        import os
        import select
        import signal
        import traceback

        def one(attack: Callable[[Facts], Verdict]) -> Verdict:
            read_end, write_end = os.pipe()
            own = {int(name) for name in os.listdir("/proc/self/fd")}
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(read_end)
                    try:
                        # Ours is what leads to the orchestrator and what leads back; see facts.
                        known = [d for d in (3, write_end) if d in own]
                        answer = attack({**facts, "own_descriptors": known})
                    except BaseException:  # noqa: BLE001 -- an attack that fails must say so
                        answer = {"error": traceback.format_exc(limit=-3)}
                    os.write(write_end, json.dumps(answer).encode())
                finally:
                    os._exit(0)
            os.close(write_end)
            text = b""
            poller = select.poll()
            poller.register(read_end, select.POLLIN)
            while poller.poll(limit_seconds * 1_000) and (data := os.read(read_end, 65_536)):
                text += data
            os.close(read_end)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            if not text:
                return {"error": f"no verdict; wait status {status}"}
            answer: Verdict = json.loads(text)
            return answer

        return {name: one(attack) for name, attack in attacks.items()}

    return run


def group(rows: Sequence[Row], *, weakened: bool) -> dict[tuple[Any, ...], list[Row]]:
    """Return the rows that one worker, or one pair of workers, can try in one go."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.where == "inside":
            words = tuple(sorted(row.weakened_by if weakened else row.faults))
            key = (words, json.dumps(row.resources, sort_keys=True), row.first is not None)
            groups.setdefault(key, []).append(row)
    return groups


__all__ = ["Arena", "Grounds", "group", "running_arena", "task_of", "tools"]
