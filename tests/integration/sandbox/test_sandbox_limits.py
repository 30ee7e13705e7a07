"""Limits that bite: memory, processes, CPU, files, and output."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hayflick_sandbox.messages import Beat
from hayflick_sandbox.policy import MIB, Limits, Policy

FILL = """
    import errno, json, os, sys
    directory, chunk = sys.argv[1], bytes(1 << 16)
    written = files = 0
    try:
        with open(f"{directory}/fill", "wb", 0) as file:
            while written < 1 << 30:
                written += file.write(chunk)
    except OSError as error:
        full = errno.errorcode[error.errno]
    os.unlink(f"{directory}/fill")
    try:
        while files < 1 << 20:
            os.mknod(f"{directory}/{files}")
            files += 1
    except OSError as error:
        no_more = errno.errorcode[error.errno]
    print(json.dumps([written, full, files, no_more]))
"""


@pytest.mark.layers("memory")
def test_a_memory_hog_is_killed_by_its_own_limit(house: Any) -> None:
    """A task that takes more memory than it may is killed, the kernel counts it, and init lives on."""
    policy = Policy(Limits(memory_bytes=48 * MIB))
    with house.sandbox(policy) as sandbox:
        done = sandbox.python("data = bytearray(200 << 20)")
        assert done.signal == signal.SIGKILL
        assert house.tree.oom_kills(sandbox.name) >= 1
        peak = house.tree.usage(sandbox.name).memory_peak_bytes
        assert peak is None or peak <= policy.limits.memory_bytes
        assert sandbox.run("true").exit_code == 0


def test_an_own_sigkill_is_no_want_of_memory(house: Any) -> None:
    """A task that kills itself leaves the kernel's count of memory kills at zero."""
    with house.sandbox() as sandbox:
        assert sandbox.python("import os; os.kill(os.getpid(), 9)").signal == signal.SIGKILL
        assert house.tree.oom_kills(sandbox.name) == 0


@pytest.mark.layers("memory")
def test_files_in_memory_count_as_memory(house: Any) -> None:
    """What a worker writes to its private directories counts against its memory."""
    policy = Policy(Limits(memory_bytes=32 * MIB, workspace_bytes=1024 * MIB))
    with house.sandbox(policy) as sandbox:
        done = sandbox.python("open('/workspace/x', 'wb').write(bytes(1 << 20) * 100)")
        assert done.signal == signal.SIGKILL
        assert house.tree.oom_kills(sandbox.name) >= 1


def test_a_fork_bomb_hits_its_wall(house: Any) -> None:
    """At the pids limit fork answers EAGAIN; init is not counted, and the host forks as before."""
    code = """
        import errno, json, os, time
        forked = 0
        try:
            while forked < 500:
                if os.fork() == 0:
                    time.sleep(60)
                forked += 1
        except OSError as error:
            print(json.dumps([forked, errno.errorcode[error.errno]]), flush=True)
        os.kill(-1, 9)
    """
    with house.sandbox(Policy(Limits(pids=20))) as sandbox:
        running = sandbox.start("python", "-I", "-c", "\n".join(line[8:] for line in code.splitlines()))
        assert running.line() == '[19, "EAGAIN"]\n'
        subprocess.run(["true"], check=True)
        running.finish()


def test_a_task_without_a_process_fails_alone(house: Any) -> None:
    """A task for which no process is left exits 126 and says why; init lives on."""
    with house.sandbox(Policy(Limits(pids=1))) as sandbox:
        waiting = sandbox.start("sleep", "60")
        while not sandbox.children():
            continue
        done = sandbox.run("true")
        assert done.exit_code == 126
        assert "pids limit" in done.errors
        for pid in sandbox.children():
            os.kill(pid, signal.SIGKILL)
        assert waiting.finish().signal == signal.SIGKILL
        assert sandbox.run("true").exit_code == 0


@pytest.mark.parametrize("millis", [150, 350])
@pytest.mark.layers("cpu")
def test_a_spinner_gets_its_share(house: Any, millis: int) -> None:
    """A spinner has the policy's share in each period in which the kernel held it back, and never more.

    However busy the machine is otherwise: periods in which others kept the CPU from it count for nothing.
    """
    seconds = millis / 1_000 * 1.5
    code = f"import time\nwhile time.process_time() < {seconds}: pass"
    with house.sandbox(Policy(Limits(cpu_millis=millis))) as sandbox:
        assert sandbox.python(code).exit_code == 0
        text = (house.tree._leaf(sandbox.name, "cpu") / "cpu.stat").read_text()
        stat = {name: int(number) for name, number in map(str.split, text.splitlines())}
        used = house.tree.usage(sandbox.name).cpu_seconds
    assert used >= seconds
    assert stat["nr_throttled"] > 0
    share_seconds = millis / 1_000 * 0.1
    assert 0.85 * stat["nr_throttled"] * share_seconds <= used <= 1.15 * stat["nr_periods"] * share_seconds


def test_cpu_time_ends_with_its_own_signal(house: Any) -> None:
    """A task over its CPU time gets SIGXCPU, which nothing else sends."""
    with house.sandbox(Policy(Limits(cpu_time_seconds=1))) as sandbox:
        assert sandbox.python("while True: pass").signal == signal.SIGXCPU


@pytest.mark.parametrize(
    ("directory", "size"), [("/tmp", 4 * MIB), ("/dev/shm", 4 * MIB), ("/workspace", 8 * MIB)]
)
def test_private_directories_are_bounded(house: Any, directory: str, size: int) -> None:
    """A private directory is full at its size and at its number of files: ENOSPC."""
    policy = Policy(Limits(tmp_bytes=4 * MIB, workspace_bytes=8 * MIB))
    with house.sandbox(policy) as sandbox:
        written, full, files, no_more = sandbox.ask(FILL, directory)
    assert (full, no_more) == ("ENOSPC", "ENOSPC")
    assert written <= size
    assert size // 4096 - 8 <= files <= size // 4096


def test_a_directory_of_nothing(house: Any) -> None:
    """A size of zero is next to nothing and not, as tmpfs would have it, no limit."""
    with house.sandbox(Policy(Limits(tmp_bytes=0))) as sandbox:
        written, full, files, no_more = sandbox.ask(FILL, "/tmp")
    assert (full, no_more) == ("ENOSPC", "ENOSPC")
    assert written <= 4096
    assert files <= 64


def test_one_file_is_bounded(house: Any) -> None:
    """A file over its size limit answers EFBIG to Python, and kills a program with SIGXFSZ."""
    code = """
        import errno, json
        try:
            open("/tmp/x", "wb", 0).write(bytes(1 << 20))
            open("/tmp/x", "ab", 0).write(bytes(1))
        except OSError as error:
            print(json.dumps(errno.errorcode[error.errno]))
    """
    with house.sandbox(Policy(Limits(file_size_bytes=MIB))) as sandbox:
        assert sandbox.ask(code) == errno.errorcode[errno.EFBIG]
        assert sandbox.run("sh", "-c", "exec head -c 2000000 /dev/zero > /tmp/y").signal == signal.SIGXFSZ


def test_descriptors_are_bounded(house: Any) -> None:
    """At the limit of descriptors open() answers EMFILE, and the least limit is enough to start."""
    code = """
        import errno, json, os
        try:
            while True:
                os.open("/", os.O_RDONLY)
        except OSError as error:
            print(json.dumps(errno.errorcode[error.errno]))
    """
    with house.sandbox(Policy(Limits(open_files=16))) as sandbox:
        assert sandbox.ask(code) == "EMFILE"


def test_the_least_policy_runs(house: Any) -> None:
    """A program runs under the smallest limits that a policy may have."""
    least = Limits(16 * MIB, 1_000, 1, 16, 0, 0, 0, 64 * 1024, 1)
    with house.sandbox(Policy(least)) as sandbox:
        assert sandbox.run("true").exit_code == 0


def test_a_flood_waits_for_its_reader(house: Any) -> None:
    """Output that nobody reads stops the writer, not init: beats go on and the task can be killed."""
    with house.sandbox() as sandbox:
        flood = sandbox.start("yes")
        assert flood.line().startswith("y\n")
        sandbox.hear(Beat)
        for pid in sandbox.children():
            os.kill(pid, signal.SIGKILL)
        assert flood.finish().signal == signal.SIGKILL


def test_reads_from_disk_are_slowed(house: Any) -> None:
    """Reading what is on disk, and dropping it from memory to read it again, goes no faster than allowed."""
    if not house.tree.enforces("io"):
        pytest.skip("no disk here takes a limit")
    code = """
        import json, os, sys, time
        path = os.path.realpath(sys.executable)
        file = os.open(path, os.O_RDONLY)
        size = min(os.fstat(file).st_size, 4 << 20)
        started, read = time.monotonic(), 0
        while read < 4 << 20:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.lseek(file, 0, 0)
            read += len(os.read(file, size))
        print(json.dumps(time.monotonic() - started))
    """
    with house.sandbox(Policy(Limits(io_read_bytes_per_second=MIB))) as sandbox:
        before = _bytes_read(house, sandbox)
        seconds = sandbox.ask(code)
        read = _bytes_read(house, sandbox) - before
    # What others map stays in memory; what was read is what counts.
    assert seconds >= 0.7 * (read / MIB) - 0.5, (read, seconds)


def _bytes_read(house: Any, sandbox: Any) -> int:
    if "blkio" in house.tree._of:
        stat = (house.tree._leaf(sandbox.name, "blkio") / "blkio.throttle.io_service_bytes").read_text()
        return sum(int(line.split()[2]) for line in stat.splitlines() if " Read " in line)
    stat = (house.tree._leaf(sandbox.name, "io") / "io.stat").read_text()
    return sum(int(word.removeprefix("rbytes=")) for word in stat.split() if word.startswith("rbytes="))


def test_full_directories_take_nothing_from_the_host(house: Any) -> None:
    """While a worker's directories are full, the host's file systems have as much room as before."""

    def room() -> dict[str, int]:
        return {path: os.statvfs(path).f_bfree for path in ("/dev/shm", "/run") if Path(path).is_mount()}

    with house.sandbox(Policy(Limits(tmp_bytes=16 * MIB, workspace_bytes=64 * MIB))) as sandbox:
        before = room()
        for directory in ("/tmp", "/dev/shm", "/workspace"):
            code = f"""
                import json
                try:
                    open("{directory}/fill", "wb").write(bytes(65 << 20))
                except OSError as error:
                    print(json.dumps(error.errno))
            """
            assert sandbox.ask(code) == errno.ENOSPC
        lost = {path: before[path] - left for path, left in room().items()}
    assert all(blocks < 4 * MIB // 4096 for blocks in lost.values()), lost


def test_loopback_is_the_sandboxs_own(house: Any) -> None:
    """With loopback a worker talks to itself over TCP; without, it cannot even make the socket."""
    code = """
        import json, socket
        try:
            server = socket.create_server(("127.0.0.1", 0))
            client = socket.create_connection(server.getsockname())
            client.sendall(b"x")
            print(json.dumps(server.accept()[0].recv(1).decode()))
        except OSError as error:
            print(json.dumps(error.errno))
    """
    with house.sandbox(Policy(loopback=True)) as one, house.sandbox() as other:
        assert one.ask(code) == "x"
        assert other.ask(code) == errno.EAFNOSUPPORT
        interfaces = {line.split(":")[0].strip() for line in one.proc("net/dev").splitlines()[2:]}
        assert interfaces == {"lo"}


def test_loopback_reaches_no_host(house: Any) -> None:
    """With loopback, a port of the host's and an address of the world are out of reach."""
    code = """
        import errno, json, socket, sys
        answers = []
        for address in (("127.0.0.1", int(sys.argv[1])), ("169.254.169.254", 80), ("192.0.2.1", 80)):
            with socket.socket() as sock:
                sock.settimeout(2)
                try:
                    sock.connect(address)
                    answers.append(0)
                except OSError as error:
                    answers.append(errno.errorcode[error.errno])
        print(json.dumps(answers))
    """
    with socket.create_server(("127.0.0.1", 0)) as server, house.sandbox(Policy(loopback=True)) as sandbox:
        answers = sandbox.ask(code, str(server.getsockname()[1]))
    assert answers == ["ECONNREFUSED", "ENETUNREACH", "ENETUNREACH"]


def test_what_lies_below_tmp_is_shown(make_house: Any, tmp_path: Path) -> None:
    """A path below /tmp that the operator made readable is there, read-only, within the private /tmp."""
    tmp_path.chmod(0o755)
    (tmp_path / "given").write_text("text")
    with make_house(readable=(str(tmp_path),)) as house, house.sandbox() as sandbox:
        assert sandbox.run("cat", str(tmp_path / "given")).out == "text"
        assert sandbox.run("touch", str(tmp_path / "given")).exit_code != 0
        assert sandbox.run("touch", "/tmp/own").exit_code == 0
