"""TLS and mutual TLS, with certificates made on the spot, to names and IPs of both families."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipam.errors import Ambiguous, StoreUnavailable
from ipam.store import Put, Txn, open_store
from tests.ipam.store.etcd_members import Cluster
from tests.patience import PATIENCE

pytestmark = pytest.mark.etcd


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.ca = directory / f"{name}.pem"
        self._openssl("req", "-x509", *self._new(name), "-out", self.ca)

    def issue(self, name: str, usage: str, names: str) -> tuple[Path, Path]:
        """Certificate and key for ``names`` (as openssl writes them), for serverAuth or clientAuth."""
        request, cert = self.directory / f"{name}.csr", self.directory / f"{name}.pem"
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage={usage}\n")
        self._openssl("req", *self._new(name), "-out", request)
        signer = ("-CA", self.ca, "-CAkey", self.directory / f"{self.name}.key", "-CAcreateserial")
        self._openssl(
            "x509", "-req", "-in", request, *signer, "-extfile", extensions, "-days", "2", "-out", cert
        )
        return cert, self.directory / f"{name}.key"

    def _new(self, name: str) -> tuple[object, ...]:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        return (*key, "-keyout", self.directory / f"{name}.key", "-subj", f"/CN={name}")

    def _openssl(self, *arguments: object) -> None:
        done = subprocess.run(
            ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr


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
