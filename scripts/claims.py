"""Seconds that several workers take to claim all of 300 jobs in a database: `python scripts/claims.py URL`."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from server.films.database import Database
from server.films.store import JobStore
from server.films.tables import VideoJob

JOBS = 300


def seconds(url: str, workers: int) -> float:
    """Claim 300 new jobs by so many workers, each with connections of its own."""
    databases = [Database(url) for _ in range(workers)]
    stores = [JobStore(each) for each in databases]
    model = f"claims-{time.time()}"
    for _ in range(JOBS):
        stores[0].add(VideoJob("", model, {}, seconds="1", size="32x32", created_at=time.time()))

    def drain(store: JobStore) -> int:
        return sum(1 for _ in iter(lambda: store.claim([model], f"{id(store)}", 60.0), None))

    since = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        claimed = sum(pool.map(drain, stores))
    taken = time.perf_counter() - since
    assert claimed == JOBS
    for database in databases:
        database.close()
    return taken


if __name__ == "__main__":
    for count in (1, 2, 8):
        print(f"{count} workers: {seconds(sys.argv[1], count):.2f} s")
