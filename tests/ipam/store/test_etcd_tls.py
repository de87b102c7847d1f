"""TLS and mutual TLS, with certificates made on the spot, to names and IPs of both families."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ipam.errors import Ambiguous, StoreUnavailable
from ipam.store import Put, Store, Txn, open_store
from ipam.store.certificates import end_of, ending_files, ending_servers
from ipam.store.etcd_url import parse
from tests.certificates import Authority, Rotated
from tests.ipam.store.etcd_members import Cluster
from tests.patience import PATIENCE

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "ca")


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[Cluster]:
    """A member that wants client certificates, and is known by a name and an IP."""
    cert, key = authority.issue("server", "serverAuth", "DNS:localhost,IP:127.0.0.1")
    own_cert, own_key = authority.issue("operator", "clientAuth", "DNS:operator")
    tls = ("--cert-file", cert, "--key-file", key, "--trusted-ca-file", authority.ca, "--client-cert-auth")
    ctl = ("--cacert", authority.ca, "--cert", own_cert, "--key", own_key)
    with Cluster(tls=[*map(str, tls)], ctl=[*map(str, ctl)]) as cluster:
        yield cluster


async def works(url: str) -> bool:
    """Raises what the store raises."""
    store = await open_store(url)
    try:
        return (await store.txn(Txn(then=(Put("a", b"1"),)))).succeeded and await store.get("a") is not None
    finally:
        await store.close()


async def fails(url: str) -> str:
    """What the store says; nothing was applied."""
    with pytest.raises(StoreUnavailable) as caught:
        await works(url)
    assert not isinstance(caught.value, Ambiguous)
    return str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_mutual_tls_to_a_name_and_to_an_ip(authority: Authority, mutual: Cluster, host: str) -> None:
    cert, key = authority.issue("client", "clientAuth", "DNS:client")
    (member,) = mutual.members
    assert await works(f"etcd://{host}:{member.client_port}?ca={authority.ca}&cert={cert}&key={key}")


async def test_without_a_client_certificate_nothing_works(authority: Authority, mutual: Cluster) -> None:
    assert "certificates in the store URL" in await fails(mutual.url(ca=authority.ca))


async def test_a_client_of_another_authority_is_refused(
    authority: Authority, mutual: Cluster, tmp_path: Path
) -> None:
    cert, key = Authority(tmp_path, "other").issue("stranger", "clientAuth", "DNS:stranger")
    await fails(mutual.url(ca=authority.ca, cert=cert, key=key))


async def test_a_client_certificate_that_is_over_is_named(authority: Authority, mutual: Cluster) -> None:
    cert, key = authority.issue("over", "clientAuth", "DNS:over", days=0)
    async with asyncio.timeout(PATIENCE):
        while "has expired" not in "".join(
            ending_files(parse(f"etcd://a?ca={authority.ca}&cert={cert}&key={key}"))
        ):
            await asyncio.sleep(0.05)
    assert f"the client certificate {cert} has expired, on" in await fails(
        mutual.url(ca=authority.ca, cert=cert, key=key)
    )


async def test_a_key_of_another_certificate_is_named(authority: Authority, mutual: Cluster) -> None:
    cert, _ = authority.issue("client", "clientAuth", "DNS:client")
    _, key = authority.issue("another", "clientAuth", "DNS:another")
    sentence = f"the key {key} is not the one of the client certificate {cert}"
    assert sentence in await fails(mutual.url(ca=authority.ca, cert=cert, key=key))
    url = parse(f"etcd://a?ca={authority.ca}&cert={cert}&key={key}")
    assert [text.startswith(sentence) for text in ending_files(url, time.time() - 30 * 86400)] == [True]
    # What is no key or certificate at all is not told apart here.
    key.write_text("nothing")
    assert ending_files(url, time.time() - 30 * 86400) == []


async def test_a_server_of_another_authority_is_not_believed(
    authority: Authority, mutual: Cluster, tmp_path: Path
) -> None:
    cert, key = authority.issue("client", "clientAuth", "DNS:client")
    message = await fails(mutual.url(ca=Authority(tmp_path, "other").ca, cert=cert, key=key))
    assert "CERTIFICATE_VERIFY_FAILED" in message


async def test_a_server_with_another_name_is_not_believed(authority: Authority) -> None:
    cert, key = authority.issue("elsewhere", "serverAuth", "DNS:elsewhere.example")
    tls = ["--cert-file", str(cert), "--key-file", str(key)]
    with Cluster(tls=tls, ctl=["--insecure-skip-tls-verify", "--insecure-transport=false"]) as cluster:
        assert "127.0.0.1" in await fails(cluster.url(ca=authority.ca))


async def test_plain_text_to_a_tls_server_fails_and_says_so(mutual: Cluster) -> None:
    assert "cannot be reached" in await fails(mutual.url())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_ipv6_in_brackets(authority: Authority, secure: bool) -> None:
    cert, key = authority.issue("six", "serverAuth", "IP:::1")
    tls = ["--cert-file", str(cert), "--key-file", str(key)] if secure else []
    ctl = ["--cacert", str(authority.ca)] if secure else []
    options = {"ca": authority.ca} if secure else {}
    with Cluster(host="[::1]", tls=tls, ctl=ctl) as cluster:
        assert await works(cluster.url(**options))


def member_with(rotated: Rotated) -> Cluster:
    """A member with mutual TLS."""
    tls = (
        "--cert-file", rotated.server_cert, "--key-file", rotated.server_key,
        "--trusted-ca-file", rotated.trusted, "--client-cert-auth",
    )  # fmt: skip
    ctl = ("--cacert", rotated.trusted, "--cert", rotated.server_cert, "--key", rotated.server_key)
    return Cluster(tls=[*map(str, tls)], ctl=[*map(str, ctl)])


def url_of(cluster: Cluster, rotated: Rotated) -> str:
    return cluster.url(ca=rotated.ca, cert=rotated.cert, key=rotated.key)


@pytest.fixture
def rotated(tmp_path: Path) -> Rotated:
    return Rotated(tmp_path)


def restart(cluster: Cluster) -> None:
    """etcd reads its authorities when it starts."""
    (member,) = cluster.members
    member.kill()
    cluster.restart(member)
    cluster.await_leader()


async def again(store: Store) -> None:
    """Wait until a transaction is taken."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(StoreUnavailable):
                assert (await store.txn(Txn(then=(Put("a", b"1"),)))).succeeded
                return


@contextlib.asynccontextmanager
async def opened(rotated: Rotated) -> AsyncIterator[tuple[Cluster, Store]]:
    """An etcd with these certificates, and an open store in it."""
    with member_with(rotated) as cluster:
        store = await open_store(url_of(cluster, rotated))
        try:
            yield cluster, store
        finally:
            await store.close()


async def test_certificates_and_authority_are_replaced_under_an_open_store(rotated: Rotated) -> None:
    async with opened(rotated) as (cluster, store):
        await again(store)
        _, new = rotated.rotate()
        rotated.replace(new)
        restart(cluster)
        await again(store)


async def test_a_watch_goes_on_after_certificates_were_replaced(rotated: Rotated) -> None:
    async with opened(rotated) as (cluster, store):
        watch = aiter(store.watch("a", (await store.txn(Txn(then=(Put("a", b""),)))).revision + 1))
        waiting = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.1)
        _, new = rotated.rotate()
        rotated.replace(new)
        restart(cluster)
        await again(store)
        async with asyncio.timeout(PATIENCE):
            assert [event.key for event in (await waiting).events] == ["a"]


async def test_a_server_that_is_restarted_before_the_files_are_there_is_reached_when_they_are(
    rotated: Rotated,
) -> None:
    async with opened(rotated) as (cluster, store):
        await again(store)
        _, new = rotated.rotate()
        rotated.replace(new, clients=False)
        restart(cluster)
        with pytest.raises(StoreUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
            await store.txn(Txn(then=(Put("a", b"1"),)))
        # A certificate whose key is not there yet.
        key = rotated.key.read_bytes()
        rotated.replace(new, servers=False)
        new_key = rotated.key.read_bytes()
        rotated.key.write_bytes(key)
        with pytest.raises(StoreUnavailable):
            await store.txn(Txn(then=(Put("a", b"1"),)))
        rotated.key.write_bytes(new_key)
        await again(store)


async def test_with_old_and_new_authority_in_one_file_nothing_has_to_be_done_at_once(
    rotated: Rotated,
) -> None:
    async with opened(rotated) as (cluster, store):
        await again(store)
        old, new = rotated.rotate()
        # Both sides trust both, then one after the other has a certificate of the new one, then the old one goes.
        rotated.replace(new, old)
        restart(cluster)
        await again(store)
        rotated.replace(old, new, clients=False)
        restart(cluster)
        await again(store)
        rotated.replace(old, new, servers=False)
        await again(store)
        rotated.replace(new)
        restart(cluster)
        await again(store)


async def test_the_end_of_a_certificate_is_told_for_both_sides(rotated: Rotated) -> None:
    with member_with(rotated) as cluster:
        url = parse(url_of(cluster, rotated))
        (text,) = ending_files(url)  # the authority's own lasts for 30 days
        assert text.startswith(f"the client certificate {rotated.cert} expires in 2 days, on ")
        (text,) = ending_servers(url)
        assert text.startswith(f"the certificate of etcd at {url.addresses[0]} expires in 2 days, on ")
    assert ending_servers(url) == [], "who cannot be reached has nothing to say"


def test_what_ends_later_or_cannot_be_read_is_not_told(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("lasting", "clientAuth", "DNS:client", days=20)
    # The authority's own lasts for 30 days.
    lasting = parse(f"etcd://a?ca={authority.ca}&cert={cert}&key={key}")
    assert ending_files(lasting, time.time() + 5 * 86400) == []
    assert [text.split(" expires")[0] for text in ending_files(lasting, time.time() + 7 * 86400)] == [
        f"the client certificate {cert}"
    ]
    (over,) = ending_files(parse(f"etcd://a?ca={authority.ca}"), time.time() + 31 * 86400)
    assert over.startswith(f"the certificate authority {authority.ca} has expired, on ")
    for content in (b"", b"nonsense", cert.read_bytes()[:200], b"\xff"):
        (tmp_path / "ca").write_bytes(content)
        assert ending_files(parse(f"etcd://a?ca={tmp_path}/ca")) == []
    assert ending_files(parse("etcd://a")) == ending_servers(parse("etcd://a")) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_certificate_has_no_end_or_another_one(authority: Authority, seed: int) -> None:
    der = ssl.PEM_cert_to_DER_cert(authority.ca.read_text())
    rng = random.Random(seed)
    for _ in range(2000):
        damaged = bytearray(der[: rng.randrange(len(der) + 1)])
        for _ in range(rng.randrange(4)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            assert isinstance(end_of(bytes(damaged)), float), f"seed {seed}"
