"""Stand-ins on loopback, and how they are asked: with the standard library only."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.standins.service import Service


@dataclass(frozen=True)
class Said:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(service: Service, method: str, path: str, body: Any = None, **headers: str) -> Said:
    """One request on a connection of its own. A header's underscores become dashes."""
    link = http.client.HTTPConnection(service.host, service.port, timeout=10)
    try:
        sent = {name.replace("_", "-"): text for name, text in headers.items()}
        link.request(method, path, None if body is None else json.dumps(body), sent)
        answer = link.getresponse()
        return Said(answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read())
    finally:
        link.close()


def listen(service: Service, path: str = "/v2/events", method: str = "GET", body: Any = None) -> Stream:
    """Open an endless answer."""
    return Stream(service, path, method, body)


class Stream:
    """Lines of an endless answer, as they come."""

    def __init__(self, service: Service, path: str, method: str, body: Any) -> None:
        url = urlsplit(service.url)
        assert url.hostname is not None
        self._link = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
        raw = None if body is None else json.dumps(body)
        self._link.request(method, path, raw, {"accept": "text/event-stream"})
        self.answer = self._link.getresponse()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.answer.close()
        self._link.close()

    def lines(self) -> Iterator[bytes]:
        """Until the other side ends it. Raises IncompleteRead if that was in the middle."""
        while line := self.answer.readline():
            yield line

    def events(self) -> Iterator[tuple[str, str]]:
        """(event, data) of each; data as it came."""
        kind = ""
        for line in self.lines():
            name, _, text = line.decode().strip().partition(": ")
            if name == "event":
                kind = text
            elif name == "data":
                yield kind, text

    def record(self) -> Any:
        """The next one of RecordIO."""
        size = int(self.answer.readline())
        return json.loads(self.answer.read(size))
