"""A thread that does what it is handed, one thing after another, for as long as it is not shut down.

One of ``concurrent.futures`` is over when anything but a job raises in it, for want of memory say; what was handed to
it then, and all that ever is afterwards, is waited for in vain.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import structlog

P = ParamSpec("P")
T = TypeVar("T")

log = structlog.get_logger(__name__)


class Worker(Executor):
    """See the module's docstring. An executor of one thread of that name, for the event loop's ``run_in_executor``."""

    def __init__(self, name: str) -> None:
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have it done. Raises RuntimeError once it was shut down."""
        if self._closed:
            raise RuntimeError(f"{self._thread.name} was shut down")
        future: Future[T] = Future()
        self._jobs.append((future, lambda: fn(*args, **kwargs)))
        self._wake.put(None)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; what was handed to it is still done."""
        self._closed = True
        if cancel_futures:
            for future, _ in list(self._jobs):
                future.cancel()
        self._wake.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while self._jobs or not self._closed:
            try:
                if self._jobs:
                    self._do_first()
                else:
                    self._wake.get()
            except BaseException as error:
                log.warning("worker thread goes on", thread=self._thread.name, why=repr(error))

    def _do_first(self) -> None:
        future, job = self._jobs[0]
        try:
            if future.set_running_or_notify_cancel():
                future.set_result(job())
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
        finally:
            self._jobs.popleft()
