"""The services that a program starts for itself, and which services an object uses.

One set for the whole process, started when first needed, in a private directory
and behind Unix sockets; ended with the process, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import select
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from replication import _supervisor
from replication.errors import ServiceUnavailable

MAX_SOCKET_PATH_BYTES = 107  # sun_path less its NUL; unix(7)
START_SECONDS = 3 * _supervisor.START_SECONDS + 5
STOP_SECONDS = 3 * _supervisor.STOP_SECONDS + 5

VARIABLES: Mapping[str, str] = {
    "controller": "HAYFLICK_CONTROLLER",
    "orchestrator": "HAYFLICK_ORCHESTRATOR",
    "logger": "HAYFLICK_LOGGER",
}
ALLOW_DEGRADED = "HAYFLICK_ALLOW_DEGRADED"


@dataclass(frozen=True)
class Endpoint:
    """A service to call.

    Attributes:
        name: ``controller``, ``orchestrator`` or ``logger``.
        address: Its ``unix:`` target.
        runtime: The embedded services it belongs to; ``None`` when it was given.
    """

    name: str
    address: str
    runtime: Runtime | None = None


class Runtime:
    """A running set of the three services.

    Args:
        allow_degraded: Layers of the sandbox to do without where this machine
            lacks them, by name.

    Attributes:
        directory: Sockets, data and logs of the services; gone when they are.
        pids: The process of each service, by its name.

    Raises:
        ServiceUnavailable: A service did not start; the message has what it said.
    """

    pids: Mapping[str, int]

    def __init__(self, allow_degraded: tuple[str, ...] = ()) -> None:
        interpreter = _interpreter()
        self.directory = _private_directory()
        self._pid = os.getpid()
        self._closed = False
        self._closing: list[Callable[[], None]] = []
        reader, self._lifeline = os.pipe2(os.O_CLOEXEC)
        command = [
            *(interpreter, "-P", "-m", "replication._supervisor"),
            *("--directory", str(self.directory)),
            *("--lifeline-fd", str(reader)),
            *("--node-id", f"embedded-{self._pid}-{secrets.token_hex(4)}"),
            *("--allow-degraded", ",".join(allow_degraded)),
        ]
        try:
            self._process = self._launch(command, reader)
        except BaseException:
            os.close(self._lifeline)
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        finally:
            os.close(reader)
        _running.add(self)
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Runtime {self.directory}>"

    def _launch(self, command: list[str], lifeline: int) -> subprocess.Popen[bytes]:
        with (self.directory / "supervisor.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.directory,  # the user's own folder holds nothing that we want to import
                env=_environment(),
                pass_fds=(lifeline,),
                start_new_session=True,  # Ctrl-C is for the program; it then ends us in order
            )

    def address(self, name: str) -> str:
        """Return where the service called *name* listens."""
        return _supervisor.address(self.directory, name)

    def before_close(self, step: Callable[[], None]) -> None:
        """Have *step* done before the services are stopped."""
        self._closing.append(step)

    def close(self) -> None:
        """Stop the services and everything they run; return when all is gone."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        _running.discard(self)
        while self._closing:
            self._closing.pop()()
        os.close(self._lifeline)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the services' own lifelines end with it
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _await_ready(self) -> None:
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        deadline = time.monotonic() + START_SECONDS
        said = b""
        while not said.endswith(b"\n"):
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(output, 65_536) if ready else b""
            if not chunk:
                how = "ended" if ready else f"took more than {START_SECONDS:g} s"
                log = (self.directory / "supervisor.log").read_text("utf-8", "backslashreplace")
                raise ServiceUnavailable(
                    f"the embedded services did not start: their supervisor {how}\n{log}"
                )
            said += chunk
        answer = json.loads(said)
        if "ready" not in answer:
            raise ServiceUnavailable(
                f"the embedded services did not start: {answer['failed']}\n{answer['log']}",
                details={"service": answer["service"]},
            )
        self.pids = answer["ready"]

    def forget(self) -> None:
        """In a forked child: let go of the parent's services."""
        self._closed = True
        os.close(self._lifeline)


_running: weakref.WeakSet[Runtime] = weakref.WeakSet()
_lock = threading.Lock()
_shared: Runtime | None = None
_overriding: list[Runtime] = []


def resolve(name: str, address: str | None) -> Endpoint:
    """Return the service called *name*: at *address*, where the environment says, or embedded.

    Raises:
        ValueError: An address is not a Unix socket.
        ServiceUnavailable: The embedded services did not start, or the
            environment names some services and not this one.
    """
    if address is not None:
        return Endpoint(name, require_address("address", address))
    with _lock:
        if _overriding:
            return Endpoint(name, _overriding[-1].address(name), _overriding[-1])
        given = {key: os.environ[variable] for key, variable in VARIABLES.items() if os.environ.get(variable)}
        if name in given:
            return Endpoint(name, require_address(VARIABLES[name], given[name]))
        if given:
            set_one = VARIABLES[next(iter(given))]
            raise ServiceUnavailable(
                f"{VARIABLES[name]} is not set, though {set_one} is: set all three, "
                "or none to have the services started here"
            )
        runtime = _shared_runtime()
        return Endpoint(name, runtime.address(name), runtime)


def is_given(name: str) -> bool:
    """Return whether the environment names the service called *name*, and nothing overrides it."""
    return not _overriding and bool(os.environ.get(VARIABLES[name]))


def require_address(field: str, address: object) -> str:
    """Return *address* when it names a Unix socket.

    Raises:
        ValueError: It does not. Plain TCP would let anyone in.
    """
    if not isinstance(address, str) or not address.startswith("unix:/"):
        raise ValueError(f"{field}: must be unix:///absolute/path, not {address!r}")
    return address


@contextlib.contextmanager
def overridden(runtime: Runtime) -> Iterator[None]:
    """Have every object made meanwhile use *runtime*."""
    with _lock:
        _overriding.append(runtime)
    try:
        yield
    finally:
        with _lock:
            _overriding.remove(runtime)


def allowed_by_environment() -> tuple[str, ...]:
    """Return the layers that the environment lets go, by name."""
    return tuple(filter(None, os.environ.get(ALLOW_DEGRADED, "").split(",")))


def _shared_runtime() -> Runtime:
    global _shared  # noqa: PLW0603 -- one for the process is the point
    if _shared is None:
        _shared = Runtime(allowed_by_environment())
        atexit.register(_shared.close)
    return _shared


def _after_fork_in_child() -> None:
    """Start anew: the parent's services are the parent's, and end with it, not with its children."""
    global _lock, _shared  # noqa: PLW0603 -- another thread of the parent may hold the lock for ever
    _lock = threading.Lock()
    _shared = None
    _overriding.clear()
    while _running:
        _running.pop().forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _private_directory() -> Path:
    """Return a new directory for this user alone, with a path that leaves room for socket names.

    Raises:
        ServiceUnavailable: There is no place for one.
    """
    candidates = [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]  # noqa: S108 -- mkdtemp is safe there
    for base in candidates:
        if not base or not _is_good_base(Path(base)):
            continue
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix="hayflick-", dir=base))
    raise ServiceUnavailable(
        f"the embedded services have no place for their sockets in any of {candidates}: "
        f"set XDG_RUNTIME_DIR to a directory of your own with a short path"
    )


def _is_good_base(base: Path) -> bool:
    longest = f"{base}/hayflick-xxxxxxxx/orchestrator.sock"
    if not base.is_absolute() or len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
        return False
    with contextlib.suppress(OSError):
        return stat.S_ISDIR(base.stat().st_mode) and os.access(base, os.W_OK | os.X_OK)
    return False


def _interpreter() -> str:
    if not sys.executable:
        raise ServiceUnavailable("the embedded services need a Python to run: sys.executable is empty")
    return sys.executable


def _environment() -> dict[str, str]:
    """Return this process's environment, safe for another working directory."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if search_path := environment.get("PYTHONPATH"):
        entries = [str(Path(entry).absolute()) for entry in search_path.split(os.pathsep) if entry]
        environment["PYTHONPATH"] = os.pathsep.join(entries)
    # Settings of services that somebody starts by hand (HAYFLICK_LOGGER_…) must not reach these.
    foreign = tuple(f"{variable}_" for variable in VARIABLES.values())
    return {name: value for name, value in environment.items() if not name.startswith(foreign)}
