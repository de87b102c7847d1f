"""When the certificates of an etcd URL end: said before it happens, and not by the connections that fail then.

The files are looked at as they are now. Of a file with several authorities, as there is while one takes over from
another, the one that ends last counts. The standard library tells the end of a peer's certificate only, so the few
bytes of DER that lead to it are read here (RFC 5280, 4.1: Certificate, TBSCertificate, Validity).
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from ipam.store.etcd_url import Address, EtcdUrl

SOON = 14 * 86400.0
"""Seconds before its end in which a certificate is named."""

ASK = 2.0
"""Seconds for a server to show its certificate."""

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)

_MISFIT = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")
"""OpenSSL's names for it."""

_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18


def ending_files(url: EtcdUrl, now: float | None = None) -> list[str]:
    """A sentence for each file of the URL whose certificate ends soon, or has, or whose key is another one's. now: wall
    clock, seconds."""
    return [*_misfits(url), *_endings(url, now, SOON)]


def failing_files(url: EtcdUrl, now: float | None = None) -> list[str]:
    """Of these sentences those that tell why no connection can be made: gRPC's own words do not name the file."""
    return [*_misfits(url), *_endings(url, now, 0.0)]


def _endings(url: EtcdUrl, now: float | None, within: float) -> Iterator[str]:
    for what, path in (("certificate authority", url.ca), ("client certificate", url.cert)):
        if path is not None and (ends := _end_of_file(path, what)) is not None:
            cure = "put a new one in its place, which needs no restart"
            yield from _told(f"the {what} {path}", ends, now, cure, within)


def _misfits(url: EtcdUrl) -> Iterator[str]:
    if url.cert is None or url.key is None:
        return
    try:
        # The password is for a key that has one, which is asked for otherwise.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(url.cert, url.key, password="")
    except ssl.SSLError as error:
        if error.reason in _MISFIT:
            yield (
                f"the key {url.key} is not the one of the client certificate {url.cert}; put both of one pair in their "
                "places, which needs no restart"
            )
    except (OSError, ValueError):
        return  # then no connection is made either, which is said elsewhere


def ending_servers(url: EtcdUrl, now: float | None = None) -> list[str]:
    """The same for the certificates that the servers show, as far as they can be reached. Blocks for ASK seconds
    each at most."""
    if url.ca is None:
        return []
    found: list[str] = []
    for address in url.addresses:
        try:
            ends = end_of(_shown_by(address, url))
        except (OSError, ValueError):
            continue  # the agent says what is wrong with it
        found += _told(f"the certificate of etcd at {address}", ends, now, "renew it on that machine", SOON)
    return found


def end_of(der: bytes) -> float:
    """Wall clock, seconds, of the end of a certificate's validity. Raises ValueError if it is none."""
    tag, certificate, _ = _element(der)
    _expect(tag == _SEQUENCE)
    tag, fields, _ = _element(certificate)
    _expect(tag == _SEQUENCE)
    tag, _, rest = _element(fields)
    if tag == _VERSION:
        _, _, rest = _element(rest)
    # The serial number is read by now; the algorithm and the issuer come before the validity.
    for _ in range(2):
        _, _, rest = _element(rest)
    tag, validity, _ = _element(rest)
    _expect(tag == _SEQUENCE)
    _, _, after = _element(validity)
    tag, text, _ = _element(after)
    _expect(tag in (_UTC_TIME, _GENERALIZED_TIME))
    digits = text.decode("ascii").removesuffix("Z")
    if tag == _UTC_TIME:
        digits = ("19" if digits >= "50" else "20") + digits
    return datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()


def _end_of_file(path: Path, what: str) -> float | None:
    """None if there is none in it that can be read: then no connection is made either, which is said elsewhere."""
    try:
        ends = [end_of(ssl.PEM_cert_to_DER_cert(pem.decode())) for pem in _PEM.findall(path.read_bytes())]
    except (OSError, ValueError):
        return None
    if not ends:
        return None
    # A client's certificate comes first in its file, its authorities behind it.
    return ends[0] if what == "client certificate" else max(ends)


def _told(whose: str, ends: float, now: float | None, cure: str, within: float) -> Iterator[str]:
    left = ends - (time.time() if now is None else now)
    if left < within:
        date = datetime.fromtimestamp(ends, UTC).strftime("%Y-%m-%d %H:%M UTC")
        when = f"expires in {left / 86400:.0f} days, on {date}" if left > 0 else f"has expired, on {date}"
        yield f"{whose} {when}; {cure}"


def _shown_by(address: Address, url: EtcdUrl) -> bytes:
    """Raises OSError. Not verified: only its date is read, also when it is over."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if url.cert is not None and url.key is not None:
        context.load_cert_chain(url.cert, url.key)
    with (
        socket.create_connection((address.host, address.port), ASK) as link,
        context.wrap_socket(link, server_hostname=address.host) as secured,
    ):
        return secured.getpeercert(binary_form=True) or b""


def _element(der: bytes) -> tuple[int, bytes, bytes]:
    """Tag and content of the first element, and what follows it. Raises ValueError."""
    _expect(len(der) >= 2)
    tag, length, start = der[0], der[1], 2
    if length & 0x80:
        start += length & 0x7F
        length = int.from_bytes(der[2:start])
    _expect(start + length <= len(der))
    return tag, der[start : start + length], der[start + length :]


def _expect(holds: bool) -> None:
    if not holds:
        raise ValueError("this is no X.509 certificate")
