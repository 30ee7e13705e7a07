"""A database with a write-ahead log, shared by threads and processes."""

import sqlite3
import subprocess
import sys
import threading

CHILD = """
import sqlite3
with sqlite3.connect("data.db", timeout=20) as db:
    db.execute("insert into t (who) values ('child')")
"""


def write(who: str) -> None:
    """Insert rows, each in a transaction of its own."""
    mine = sqlite3.connect("data.db", timeout=20)
    for _ in range(50):
        with mine:
            mine.execute("insert into t (who) values (?)", (who,))
    mine.close()


db = sqlite3.connect("data.db", timeout=20)
mode = db.execute("pragma journal_mode=wal").fetchone()[0]
db.execute("create table t (n integer primary key, who text)")
db.commit()
threads = [threading.Thread(target=write, args=(f"t{n}",)) for n in range(3)]
for thread in threads:
    thread.start()
subprocess.run([sys.executable, "-c", CHILD], check=True)
for thread in threads:
    thread.join()
db.execute("vacuum")
(count,), (sound,) = (
    db.execute("select count(*) from t").fetchone(),
    db.execute("pragma integrity_check").fetchone(),
)
print(mode, count, sound)
