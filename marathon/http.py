"""HTTP towards services that are several: Marathon, a Mesos master, a Mesos agent.

    http = Http("Marathon", ["https://m1:8443", "https://m2:8443"], Access(user_file=Path("/etc/moorage/marathon")))
    body = http.get("/v2/info")

- The URL that answered last is asked first; when it does not answer, the next one. A redirect to the leader is
  followed, with the credentials: who is authentic may say who leads. From https to http it is refused.
- Everything has an end: connecting, silence, a whole answer, its size. What may be asked again is, with jitter.
- Secrets are read from their files at every request, and are in no message.

Blocking; callers on an event loop use threads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
import tenacity
import urllib3

from ipam.errors import InvalidInput, MoorageError, TryAgain
from ipam.logins import read_login, read_secret
from marathon.urls import check_url

CONNECT_WITHIN = 5.0
"""Seconds to connect, TLS included."""

SILENT_AT_MOST = 30.0
"""Seconds between two pieces of an answer."""

ANSWER_WITHIN = 120.0
"""Seconds for a whole answer; 100,000 tasks are some 60 MB."""

LARGEST = 512 * 1024 * 1024
"""Bytes of an answer; more is no answer that we asked for."""

PIECE = 256 * 1024

TRIES = 3
REDIRECTS = 3
MOST_OF_A_MESSAGE = 200


class NotAnswered(TryAgain):
    """The service did not answer, or answered that it cannot now."""


class Denied(MoorageError):
    """The service does not let us ask; asking again will not help."""


class Absent(MoorageError):
    """The service says that there is no such thing."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to ask. All files are read anew at every request.

    user_file: one line ``user:password``. token_file: one line, a token, or a whole Authorization value such as
    ``token=...``. ca: PEM of the authority that signed the service's certificate, None for the system's.
    """

    user_file: Path | None = None
    token_file: Path | None = None
    ca: Path | None = None

    def headers(self, whose: str) -> dict[str, str]:
        """Raises InvalidInput naming the file that cannot be used."""
        if self.token_file is not None:
            token = read_secret(self.token_file, whose)
            if not token or not token.isascii() or not token.isprintable():
                raise InvalidInput(f"{self.token_file} holds no token of {whose}; write one line into it")
            known = token.startswith("token=") or " " in token
            return {"Authorization": token if known else f"Bearer {token}"}
        if self.user_file is not None:
            login = read_login(self.user_file, whose)
            basic = urllib3.make_headers(basic_auth=f"{login.user}:{login.password}")
            return {"Authorization": basic["authorization"]}
        return {}


NO_SECRETS = Access()


class Http:
    """See the module's docstring. name: of the service, for messages."""

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        access: Access = NO_SECRETS,
        *,
        patience: float = ANSWER_WITHIN,
    ) -> None:
        if not urls:
            raise InvalidInput(f"no URL of {name} is given; name one")
        self.name = name
        self._urls = [check_url(f"the URL of {name}", url) for url in urls]
        self._access = access
        self._patience = patience
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy, or a .netrc, is not what an operator named

    @property
    def url(self) -> str:
        """The one that is asked first now."""
        return self._urls[0]

    def close(self) -> None:
        self._session.close()

    def get(self, path: str, *, largest: int = LARGEST) -> bytes:
        """An answer's body. Raises NotAnswered, Denied, Absent, InvalidInput (a file of ours)."""
        return self._retried("GET", path, None, largest)

    def post(self, path: str, body: bytes, *, largest: int = LARGEST) -> bytes:
        """Ask with JSON a question that changes nothing. Raises as ``get``."""
        return self._retried("POST", path, body, largest)

    def _retried(self, method: str, path: str, body: bytes | None, largest: int) -> bytes:
        retry = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(NotAnswered),
            stop=tenacity.stop_after_attempt(TRIES),
            wait=tenacity.wait_exponential(multiplier=0.2, max=2) + tenacity.wait_random(0, 0.2),
            reraise=True,
        )
        return retry(self._from_any, method, path, body, largest)

    def _from_any(self, method: str, path: str, body: bytes | None, largest: int) -> bytes:
        with self._ask_any(method, path, body, {"Accept": "application/json"}, SILENT_AT_MOST) as response:
            return self._read(response, largest)

    @contextlib.contextmanager
    def stream(self, path: str, accept: str, *, silent_at_most: float) -> Iterator[Iterator[bytes]]:
        """An answer without end, piece by piece as it comes.

        Raises as ``get``, and from the iterator NotAnswered when it broke off or was silent for longer than
        ``silent_at_most`` seconds.
        """
        with self._ask_any("GET", path, None, {"Accept": accept}, silent_at_most) as response:
            yield self._pieces(response)

    def _pieces(self, response: requests.Response) -> Iterator[bytes]:
        try:
            while piece := response.raw.read1(64 * 1024, decode_content=True):
                yield piece
        except (OSError, urllib3.exceptions.HTTPError) as error:
            raise NotAnswered(
                f"{self.name} broke off in the middle ({_cause(error)}); it is asked again"
            ) from error

    @contextlib.contextmanager
    def _ask_any(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], silent: float
    ) -> Iterator[requests.Response]:
        """The first URL's answer that is one; that URL is the first from then on."""
        failures: list[str] = []
        for url in list(self._urls):
            try:
                response = self._ask(method, url + path, body, headers, silent)
            except NotAnswered as error:
                failures.append(str(error))
                continue
            self._urls = [url, *(other for other in self._urls if other != url)]
            with contextlib.closing(response):
                yield response
            return
        raise NotAnswered(
            f"{self.name} does not answer: {'; '.join(failures)}; see that it runs, and the URL"
        )

    def _ask(
        self, method: str, url: str, body: bytes | None, headers: dict[str, str], silent: float
    ) -> requests.Response:
        """One URL's answer, and where that redirects to."""
        headers = {**headers, **self._access.headers(self.name)}
        if body is not None:
            headers["Content-Type"] = "application/json"
        for _ in range(REDIRECTS + 1):
            try:
                response = self._session.request(
                    method,
                    url,
                    data=body,
                    headers=headers,
                    stream=True,
                    allow_redirects=False,
                    timeout=(CONNECT_WITHIN, silent),
                    verify=True if self._access.ca is None else str(self._access.ca),
                )
            except (requests.RequestException, OSError) as error:
                raise NotAnswered(f"{_place(url)}: {_cause(error)}") from error
            if response.status_code not in (301, 302, 303, 307, 308):
                try:
                    self._check(url, response)
                except BaseException:
                    response.close()
                    raise
                return response
            response.close()
            url = self._redirected(url, response.headers.get("Location", ""))
        raise NotAnswered(f"{_place(url)}: redirects for ever; its services do not agree who leads")

    def _redirected(self, url: str, location: str) -> str:
        # Mesos names the leader as //host:port/..., without the scheme.
        target = urljoin(url, location)
        if urlsplit(target).scheme not in ("http", "https") or not location:
            raise NotAnswered(f"{_place(url)}: redirects to nowhere")
        if urlsplit(url).scheme == "https" and urlsplit(target).scheme == "http":
            raise Denied(
                f"{_place(url)} redirects from https to http, where credentials would be seen; have {self.name} "
                "advertise its https address"
            )
        return target

    def _check(self, url: str, response: requests.Response) -> None:
        """Raises what an answer other than success means."""
        code = response.status_code
        if code < 300:
            return
        said = response.raw.read(MOST_OF_A_MESSAGE, decode_content=False).decode("utf-8", "replace")
        what = f"{_place(url)}: HTTP {code}: {' '.join(said.split())}"
        if code in (401, 403):
            raise Denied(f"{what}; see the user or token file for {self.name}, and what that user may see")
        if code == 404:
            raise Absent(what)
        raise NotAnswered(what)

    def _read(self, response: requests.Response, largest: int) -> bytes:
        until = time.monotonic() + self._patience
        body = bytearray()
        try:
            for piece in response.iter_content(PIECE):
                body += piece
                if len(body) > largest:
                    raise NotAnswered(f"{self.name}: its answer is larger than {largest} bytes")
                if time.monotonic() > until:
                    raise NotAnswered(
                        f"{self.name}: its answer was not complete within {self._patience:.0f} s"
                    )
        except (requests.RequestException, OSError, urllib3.exceptions.HTTPError) as error:
            raise NotAnswered(f"{self.name} broke off in the middle ({_cause(error)})") from error
        return bytes(body)


def _place(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _cause(error: BaseException) -> str:
    """What a library's layers of errors come down to, in a few words."""
    seen: BaseException = error
    while True:
        inner = getattr(seen, "reason", None) or seen.__cause__ or seen.__context__
        if not isinstance(inner, BaseException):
            break
        seen = inner
    text = str(seen) or type(seen).__name__
    return " ".join(text.split())[:MOST_OF_A_MESSAGE]
