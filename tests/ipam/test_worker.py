"""A thread that does what it is handed goes on whatever is raised in it, and wherever."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from concurrent.futures import Future

import pytest

from ipam.worker import Worker
from tests.patience import PATIENCE


def raise_in(name: str, error: type[BaseException] = MemoryError) -> None:
    """In the thread of that name, wherever it is, as soon as it runs again."""
    (thread,) = (one for one in threading.enumerate() if one.name.startswith(name))
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(error))


async def test_jobs_are_done_in_order_and_their_errors_are_those_of_who_asked() -> None:
    loop = asyncio.get_running_loop()
    worker = Worker("test-worker")
    done: list[int] = []
    jobs = [loop.run_in_executor(worker, done.append, n) for n in range(100)]
    refused = loop.run_in_executor(worker, int, "x")
    await asyncio.gather(*jobs)
    assert done == list(range(100))
    with pytest.raises(ValueError, match="x"):
        await refused
    worker.shutdown()
    assert not [one for one in threading.enumerate() if one.name == "test-worker"]
    with pytest.raises(RuntimeError, match="was shut down"):
        worker.submit(done.append, 1)


def test_what_is_raised_between_two_jobs_costs_no_job() -> None:
    worker = Worker("test-worker")
    for number in range(20):
        assert worker.submit(int, number).result(PATIENCE) == number
        raise_in("test-worker")
    worker.shutdown()


def test_what_is_raised_in_the_middle_of_a_job_is_that_jobs_error() -> None:
    worker = Worker("test-worker")
    begun, go_on = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        while not go_on.wait(0.01):
            pass

    running: Future[None] = worker.submit(job)
    begun.wait(PATIENCE)
    raise_in("test-worker")
    with pytest.raises(MemoryError):
        running.result(PATIENCE)
    assert worker.submit(int, 7).result(PATIENCE) == 7
    worker.shutdown()


def test_a_job_that_was_cancelled_in_time_is_not_done() -> None:
    worker = Worker("test-worker")
    go_on = threading.Event()
    first = worker.submit(go_on.wait, PATIENCE)
    second = worker.submit(pytest.fail, "it was cancelled")
    assert second.cancel()
    go_on.set()
    assert first.result(PATIENCE)
    worker.shutdown()
    assert second.cancelled()
