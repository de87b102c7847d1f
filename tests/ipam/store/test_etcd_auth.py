"""Users of etcd: tokens that expire, rights that are missing, passwords that change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ipam.errors import Ambiguous, StoreUnavailable
from ipam.store import Put, Store, Txn, open_store
from tests.ipam.store.etcd_members import Cluster
from tests.patience import PATIENCE

pytestmark = pytest.mark.etcd

TOKEN_TTL = 1
"""Seconds after its last use that a token is forgotten; the least that etcd can be told."""

PASSWORD = "hunter2"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """A member with users: root, moorage for /moorage/, and nobody with no rights."""
    arguments = ["--auth-token-ttl", str(TOKEN_TTL), "--bcrypt-cost", "4"]
    with Cluster(arguments=arguments, ctl=[]) as cluster:
        for user in ("root", "moorage", "nobody"):
            cluster.ctl("user", "add", f"{user}:{PASSWORD}")
        cluster.ctl("user", "grant-role", "root", "root")
        cluster.ctl("role", "add", "moorage")
        cluster.ctl("role", "grant-permission", "moorage", "--prefix=true", "readwrite", "/moorage/")
        cluster.ctl("user", "grant-role", "moorage", "moorage")
        cluster.ctl("auth", "enable")
        yield cluster


def user_file(directory: Path, user: str = "moorage", password: str = PASSWORD) -> Path:
    path = directory / "user"
    path.write_text(f"{user}:{password}\n")
    path.chmod(0o600)
    return path


@pytest.fixture
async def store(guarded: Cluster, tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(guarded.url(user_file=user_file(tmp_path)))
    yield store
    await store.close()


async def put(store: Store, key: str) -> int:
    return (await store.txn(Txn(then=(Put(key, b""),)))).revision


async def refused(store: Store) -> str:
    """What a transaction is told; it was not applied. Closes the store."""
    with pytest.raises(StoreUnavailable) as caught:
        await put(store, "k/refused")
    await store.close()
    assert not isinstance(caught.value, Ambiguous)
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
async def test_a_token_that_expired_is_renewed_in_passing(
    store: Store, guarded: Cluster, tmp_path: Path
) -> None:
    reader, watcher, many = [await open_store(guarded.url(user_file=user_file(tmp_path))) for _ in range(3)]
    last = await put(store, "k/a")
    for one in (reader, watcher, many):
        assert await one.get("k/a") is not None
    # Forgotten at the latest when etcd looks for the second time, once a second.
    await asyncio.sleep(TOKEN_TTL + 1.2)
    assert await put(store, "k/b") == last + 1
    assert await reader.get("k/b") is not None
    batch = await asyncio.wait_for(anext(watcher.watch("k/", last + 1)), PATIENCE)
    assert [event.key for event in batch.events] == ["k/b"]
    await asyncio.gather(*(put(many, f"k/many{i}") for i in range(20)))
    for one in (reader, watcher, many):
        await one.close()


async def test_a_change_of_users_is_survived(store: Store, guarded: Cluster) -> None:
    await put(store, "k/before")
    root = ("--user", f"root:{PASSWORD}")
    await asyncio.to_thread(guarded.ctl, *root, "role", "add", "another")
    await put(store, "k/after")
    assert await store.get("k/after") is not None


async def test_password_user_role_and_authentication_change_under_an_open_store(
    guarded: Cluster, tmp_path: Path
) -> None:
    root = ("--user", f"root:{PASSWORD}")

    async def ctl(*arguments: str) -> None:
        await asyncio.to_thread(guarded.ctl, *root, *arguments)

    async def goes_on(key: str) -> None:
        """Wait until a transaction is taken, and the watch and the lease of before have outlived the change."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(StoreUnavailable):
                    await put(store, key)
                    break
            while key not in seen:
                await asyncio.sleep(0.02)
        assert lease.alive

    async def follow(begin: int) -> None:
        async for batch in store.watch("c/", begin):
            seen.update(event.key for event in batch.events)

    await ctl("user", "add", "changing:first")
    await ctl("user", "grant-role", "changing", "moorage")
    file = user_file(tmp_path, "changing", "first")
    store = await open_store(guarded.url(user_file=file))
    seen: set[str] = set()
    begin = await put(store, "c/begin")
    lease = await store.lease(PATIENCE)
    following = asyncio.create_task(follow(begin))
    try:
        await goes_on("c/as-before")
        # Another password, and a user of the same name who is not the same.
        await ctl("user", "delete", "changing")
        await ctl("user", "add", "changing:second")
        await ctl("user", "grant-role", "changing", "moorage")
        user_file(tmp_path, "changing", "second")
        await goes_on("c/another-password")
        await ctl("user", "revoke-role", "changing", "moorage")
        with pytest.raises(StoreUnavailable, match="denies this user"):
            await put(store, "c/without-a-role")
        await ctl("user", "grant-role", "changing", "moorage")
        await goes_on("c/a-role-again")
        await ctl("auth", "disable")
        await goes_on("c/nobody-is-asked")
        await ctl("auth", "enable")
        await goes_on("c/everybody-is-asked")
        assert not following.done()
    finally:
        following.cancel()
        await asyncio.wait([following])
        await store.close()


@pytest.mark.slow
async def test_leases_work_with_users(store: Store) -> None:
    lease = await store.lease(4)
    await store.txn(Txn(then=(Put("k/leased", b"", lease.id),)))
    await asyncio.sleep(4.4)
    assert lease.alive
    await lease.revoke()
    assert await store.get("k/leased") is None


async def test_a_wrong_password_is_named_by_its_file(guarded: Cluster, tmp_path: Path) -> None:
    store = await open_store(guarded.url(user_file=user_file(tmp_path, password="wrong")))
    assert "correct the user-file" in await refused(store)


async def test_a_corrected_password_is_read_without_a_restart(guarded: Cluster, tmp_path: Path) -> None:
    store = await open_store(guarded.url(user_file=user_file(tmp_path, password="wrong")))
    with pytest.raises(StoreUnavailable):
        await store.get("k/a")
    user_file(tmp_path)
    await put(store, "k/corrected")
    await store.close()


async def test_no_user_where_one_is_wanted(guarded: Cluster) -> None:
    assert "user-file=" in await refused(await open_store(guarded.url()))


async def test_a_user_without_rights(guarded: Cluster, tmp_path: Path) -> None:
    store = await open_store(guarded.url(user_file=user_file(tmp_path, "nobody")))
    with pytest.raises(StoreUnavailable, match="grant-permission"):
        await store.get("k/a")
    with pytest.raises(StoreUnavailable, match="grant-permission"):
        await asyncio.wait_for(anext(store.watch("k/", 1)), PATIENCE)
    assert "grant-permission" in await refused(store)


async def test_rights_end_at_the_prefix(guarded: Cluster, tmp_path: Path) -> None:
    store = await open_store(guarded.url(user_file=user_file(tmp_path), prefix="/elsewhere"))
    assert "grant-permission" in await refused(store)


async def test_a_user_file_is_no_hindrance_where_nobody_is_asked(etcd: Cluster, tmp_path: Path) -> None:
    store = await open_store(etcd.url(user_file=user_file(tmp_path), prefix="/nousers"))
    await put(store, "k/a")
    await store.close()


async def test_a_user_file_opened_to_others_later_is_not_used(
    store: Store, tmp_path: Path, guarded: Cluster
) -> None:
    (tmp_path / "user").chmod(0o644)
    assert "chmod 0600" in await refused(store)


async def test_a_user_with_rights_below_the_prefix_alone_is_told_where_the_history_stands(
    store: Store,
) -> None:
    revision = await put(store, "k/a")
    standing = await store.standing()
    assert (standing.revision, standing.surplus > 0) == (revision, True)
