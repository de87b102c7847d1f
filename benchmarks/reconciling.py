"""The process behind ``reconcile``: ``python -m benchmarks.reconciling URL FILE`` does one full pass, and prints a line
of JSON: seconds of its parts, and the most memory the process ever had.

FILE holds what Marathon answers to /v2/tasks; fetching it is not measured.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipam.store import open_store
from marathon.book import Book
from marathon.client import decode_tasks
from marathon.facts import Facts
from marathon.reconcile import Timing, answers_for, called_gone, judge


async def one_pass(url: str, body: bytes) -> dict[str, float]:
    took: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        took[what] = time.perf_counter() - begun

    store = await open_store(url)
    book = Book(store)
    with timed("addresses"):
        await book.load()
    with timed("tasks"):
        tasks = decode_tasks(body)
    with timed("judge"):
        assigned = book.all()
        facts = Facts(sys.argv[3], tasks, book.nodes())
        found = judge(
            assigned,
            facts,
            {},
            time.monotonic(),
            Timing(),
            answered=answers_for(assigned, facts),
            called_gone=called_gone(assigned, facts),
        )
    await store.close()
    took["processor"] = time.process_time()
    took["found"] = len(found.findings)
    took["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return took


if __name__ == "__main__":
    importlib.import_module("marathon.http")  # a listener has its clients in memory
    print(json.dumps(asyncio.run(one_pass(sys.argv[1], Path(sys.argv[2]).read_bytes()))))
