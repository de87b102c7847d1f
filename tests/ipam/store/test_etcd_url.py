"""What an etcd URL says, and how it is refused. Pure, but for small files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ipam.errors import InvalidInput
from ipam.logins import Login
from ipam.store import open_store
from ipam.store.etcd_url import Address, EtcdUrl, certificates, login, parse
from tests.patience import PATIENCE

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("10.0.0.1:2379", Address("10.0.0.1", 2379), "10.0.0.1:2379"),
        ("10.0.0.1", Address("10.0.0.1", 2379), "10.0.0.1:2379"),
        ("etcd-1.example:12379", Address("etcd-1.example", 12379), "etcd-1.example:12379"),
        ("localhost", Address("localhost", 2379), "localhost:2379"),
        ("[fd00::3]:2379", Address("fd00::3", 2379), "[fd00::3]:2379"),
        ("[::1]", Address("::1", 2379), "[::1]:2379"),
    ],
)
def test_an_endpoint_is_a_name_or_an_ip_with_a_port(text: str, address: Address, shown: str) -> None:
    assert parse(f"etcd://{text}").addresses == (address,)
    assert str(address) == shown


def test_a_url_names_any_number_of_endpoints_and_its_options() -> None:
    url = "etcd://a:1,10.0.0.2:2,[::1]:3/?ca=/c%20a.pem&cert=/c&key=/k&user-file=/u&prefix=/one/two/"
    assert parse(url) == EtcdUrl(
        (Address("a", 1), Address("10.0.0.2", 2), Address("::1", 3)),
        prefix="/one/two",
        ca=Path("/c a.pem"),
        cert=Path("/c"),
        key=Path("/k"),
        user_file=Path("/u"),
    )


def test_keys_go_below_moorage_unless_told_otherwise() -> None:
    assert parse("etcd://a").prefix == "/moorage"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("etcd://", "endpoint ''"),
        ("etcd://a,,b", "endpoint ''"),
        ("etcd://a:0", "port between"),
        ("etcd://a:65536", "port between"),
        ("etcd://a:", "port between"),
        ("etcd://a:b", "port between"),
        ("etcd://::1", "endpoint '::1'"),
        ("etcd://[::1", "endpoint"),
        ("etcd://[10.0.0.1]:1", "endpoint"),
        ("etcd://[::1]x:1", "endpoint"),
        ("etcd://a b:1", "endpoint"),
        ("etcd://-a:1", "endpoint"),
        ("etcd://a/moorage", "prefix=/moorage"),
        ("etcd://a#x", "fragment"),
        ("etcd://a?prefix", "name=value"),
        ("etcd://a?prefix=", "no value"),
        ("etcd://a?prefix=moorage", "start with a slash"),
        ("etcd://a?prefix=/", "start with a slash"),
        ("etcd://a?prefix=/m%C3%BC", "ASCII"),
        ("etcd://a?prefix=/a&prefix=/b", "twice"),
        ("etcd://a?tls=yes", "unknown option 'tls'"),
        ("etcd://a?ca=ca.pem", "absolute"),
        ("etcd://a?ca=/a%00b", "absolute"),
        ("etcd://a?ca=/a&cert=/b", "belong together"),
        ("etcd://a?cert=/a&key=/b", "add ca="),
        ("sqlite://a", "no etcd URL"),
    ],
)
def test_a_url_that_makes_no_sense_is_refused(url: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parse(url)


@pytest.mark.parametrize("url", [f"etcd://user:{SECRET}@a:1", f"etcd://a:1,user:{SECRET}@b:1?prefix=/x"])
async def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput, match="user-file=") as caught:
        await open_store(url)
    assert SECRET not in f"{caught.value!r} {caught.value.details}"


def user_file(directory: Path, content: bytes, mode: int = 0o600) -> EtcdUrl:
    path = directory / "user"
    path.write_bytes(content)
    path.chmod(mode)
    return parse(f"etcd://a?user-file={path}")


@pytest.mark.parametrize(
    ("content", "password"),
    [(b"moorage:hunter2\n", SECRET), (b"moorage:a:b c", "a:b c"), ("moorage:ü\r\n".encode(), "ü")],
)
def test_a_user_file_holds_user_and_password(tmp_path: Path, content: bytes, password: str) -> None:
    found = login(user_file(tmp_path, content))
    assert found == Login("moorage", password)
    assert password not in repr(found)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o777])
def test_a_user_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InvalidInput, match="chmod 0600"):
        login(user_file(tmp_path, b"moorage:hunter2", mode))


@pytest.mark.parametrize(
    "content", [b"", b"moorage", b":hunter2", b"moorage:", b"a:hunter2\nc:d\n", b"a:\xff"]
)
def test_a_user_file_without_a_login_is_refused_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidInput, match="user:password") as caught:
        login(user_file(tmp_path, content))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("options", ["ca={0}", "ca=/dev/null&cert={0}&key=/dev/null", "user-file={0}"])
async def test_a_file_that_is_not_there_is_said_at_once(tmp_path: Path, options: str) -> None:
    with pytest.raises(InvalidInput, match="nowhere, which the etcd URL names as"):
        await open_store(f"etcd://a?{options.format(tmp_path / 'nowhere')}")


def test_no_ca_no_tls() -> None:
    assert certificates(parse("etcd://a")) is None


def test_grpc_is_imported_for_an_etcd_url_only(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from ipam.store import open_store
asyncio.run(open_store("sqlite://{tmp_path}/store.db"))
assert not {{"grpc", "google.protobuf"}} & sys.modules.keys()
async def etcd():
    await (await open_store("etcd://127.0.0.1:1")).close()
asyncio.run(etcd())
assert "grpc" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
