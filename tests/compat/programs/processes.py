"""Subprocesses, and process pools by each start method, with locks and shared memory."""

import multiprocessing
import subprocess
import sys
from multiprocessing import shared_memory
from multiprocessing.synchronize import Lock


def square(n: int) -> int:
    """Work for a pool."""
    return n * n


def fill(name: str, lock: Lock) -> None:
    """Add one to what all share."""
    block = shared_memory.SharedMemory(name)
    with lock:
        block.buf[0] += 1
    block.close()


def main() -> None:
    """Try each way to start a process."""
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
        block, lock = shared_memory.SharedMemory(create=True, size=16), context.Lock()
        ones = [context.Process(target=fill, args=(block.name, lock)) for _ in range(3)]  # type: ignore[attr-defined]
        for one in ones:
            one.start()
        for one in ones:
            one.join()
        print(method, block.buf[0], end=" ")
        block.close()
        block.unlink()
    child = [sys.executable, "-c", "print(6 * 7)"]
    print(subprocess.run(child, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
