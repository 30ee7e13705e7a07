"""Threads, a thread pool, and an event loop with subprocesses."""

import asyncio
import queue
import threading
from concurrent.futures import ThreadPoolExecutor


async def main() -> str:
    """Talk to a child, and wait for a thread."""
    child = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    said, _ = await child.communicate(b"by cat")
    await asyncio.to_thread(len, "x")
    return said.decode()


box: queue.Queue[int] = queue.Queue()
threads = [threading.Thread(target=box.put, args=(n,)) for n in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with ThreadPoolExecutor(8) as pool:
    squares = sum(pool.map(lambda n: n * n, range(100)))
print(box.qsize(), squares, asyncio.run(main()))
