"""Journal and store made to agree: after crashes, takeovers, lost journals and restored backups."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ipam import grace, keys
from ipam.errors import Fenced, TryAgain
from ipam.holder import Owner
from ipam.records import Address, AddressState, Alive, Block
from ipam.store import Delete, Put, Store, Txn, open_store, read_prefix
from tests.ipam.faulty import FaultyStore, eventually
from tests.ipam.nodes import Node, network, stored, stored_when
from tests.patience import PATIENCE

NewNode = Callable[..., Node]


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(grace, "SECONDS", 0.3)
    return 0.3


async def delete(store: Store, *keys_: str) -> None:
    await store.txn(Txn(then=tuple(Delete(key) for key in keys_)))


async def remove_node(store: Store, name: str) -> None:
    """What `moorage node remove` does: frees all keys of the node, and its fence."""
    for prefix, kind in ((keys.ADDRESSES, Address), (keys.BLOCKS, Block)):
        for kv in (await read_prefix(store, prefix))[0]:
            if kind.decode(kv.key, kv.value).node == name:
                await delete(store, kv.key)
    await delete(store, keys.WRITERS + name)


async def test_assigned_addresses_survive_a_crash(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24")
    await node.start()
    (ip,) = await node.add(net, "c1")
    report = await node.restart()
    assert not report.lost
    assert node.holder.assigned().keys() == {ip}
    assert (await stored_when(store, lambda found: found[ip].container_id == "c1"))[ip].state == "assigned"


async def test_an_outbox_that_a_crash_cut_off_is_sent_after_it(faulty: FaultyStore, node: Node) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=4)
    await node.start()
    (gone,) = await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 4)
    faulty.down = True
    (ip,) = await node.add(net, "c2")
    node.delete(gone)
    await node.crash()
    faulty.down = False
    await node.start()
    found = await stored_when(
        faulty.store, lambda found: gone not in found or found[gone].state != "assigned"
    )
    assert found[ip].container_id == "c2"


async def test_warm_addresses_are_served_without_the_store_in_the_boot_that_wrote_them(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24")
    await node.start()
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 4)
    await node.crash()
    faulty.down = True
    node.load()
    node.serve()
    assert len(await node.add(net, "c2")) == 1


@pytest.mark.parametrize("how", ["any", "by name"])
async def test_a_journal_of_another_boot_serves_nothing_before_the_sync(
    faulty: FaultyStore, node: Node, how: str
) -> None:
    net = await network(faulty.store, "10.64.0.0/24")
    await node.start()
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 4)
    warm = next(ip for ip, held in node.holder._shelf.held.items() if held.state is AddressState.WARM)
    await node.crash()
    node.boot_id = "boot-2"
    faulty.down = True
    node.load()
    ips = [str(warm)] if how == "by name" else []
    with pytest.raises(TryAgain, match="gives out no address now"):
        await node.take(net, *ips)
    faulty.down = False
    await node.holder.sync()
    assert await node.take(net, *ips)


async def test_a_lost_journal_keeps_what_is_live_and_cools_the_rest(store: Store, new_node: NewNode) -> None:
    node = new_node(cooldown=60)
    net = await network(store, "10.64.0.0/24", warm=2)
    await node.start()
    (live,) = await node.add(net, "c1")
    (ended,) = await node.add(net, "c2")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 2)
    before = set(await stored(store))
    await node.crash()
    for file in node.path.parent.glob(f"{node.path.name}*"):
        file.unlink()
    node.live = {live}
    report = await node.start()
    assert report.adopted == [live]
    assert set(report.released) == before - {live}
    found = await stored_when(store, lambda found: found[ended].state == "cooling")
    assert {ip for ip in before if found[ip].state == "cooling"} == before - {live}
    assert {row.ip for row in node.journal.load_addresses()} >= before
    assert node.journal.load_blocks()


async def test_the_store_wins_where_it_names_another_owner(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    await node.crash()
    kv = await store.get(keys.address_key(ip))
    assert kv is not None
    theirs = Address.decode(kv.key, kv.value).with_(node="n2", container_id="theirs")
    await store.txn(Txn(then=(Put(kv.key, theirs.encode()),)))
    report = await node.start()
    assert report.lost == [ip]
    assert [(c.ip, c.holder.node) for c in node.conflicts] == [(ip, "n2")]
    assert node.holder.held(ip) is None
    assert (await stored(store))[ip].container_id == "theirs"


async def test_an_address_that_turned_out_another_nodes_while_serving_is_a_conflict(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(node.is_quiet)
    kv = await store.get(keys.address_key(ip))
    assert kv is not None
    await store.txn(Txn(then=(Put(kv.key, Address.decode(kv.key, kv.value).with_(node="n2").encode()),)))
    node.delete(ip)
    await eventually(lambda: node.holder.held(ip) is None)
    assert (await stored(store))[ip].node == "n2"


async def test_another_instance_of_the_agent_ends_serving_at_once(store: Store, new_node: NewNode) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    old = new_node()
    await old.start()
    await old.add(net, "c1")
    await eventually(lambda: old.is_quiet() and old.states().get("warm") == 4)
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", Alive(instance="new", boot_id="elsewhere").encode()),)))
    new = new_node("n1-journal", boot_id="elsewhere")
    new.name = "n1"
    await new.start()
    old.delete(*old.holder.assigned())
    await eventually(lambda: old.holder.problem)
    with pytest.raises(TryAgain, match=r"another agent|runs elsewhere"):
        await old.take(net)
    with pytest.raises(TryAgain):
        await old.take(net, "10.64.0.200")


async def test_an_agent_that_finds_its_name_alive_elsewhere_serves_nothing(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=4)
    await node.start()
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 4)
    await node.crash()
    await store.txn(Txn(then=(Put(keys.ALIVE + "n1", Alive(instance="new", boot_id="elsewhere").encode()),)))
    node.load()
    with pytest.raises(Fenced):
        await node.holder.sync()
    with pytest.raises(TryAgain):
        await node.take(net)


async def test_a_removed_node_asserts_what_it_holds_and_goes_on(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=2)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 2)
    await remove_node(store, "n1")
    # The next write tells; whether it is a release or the assignment of a warm one.
    await node.add(net, "c2")
    await stored_when(store, lambda found: ip in found)
    await eventually(lambda: not node.holder.problem)
    assert await node.take(net)
    assert await node.take(net, "10.64.0.99")


async def test_warm_addresses_are_kept_ready_again_when_the_grace_is_over(
    store: Store, node: Node, short_grace: float
) -> None:
    net = await network(store, "10.64.0.0/24", warm=3)
    await node.start()
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 3)
    await remove_node(store, "n1")
    await node.add(net, "c2")
    await stored_when(store, lambda found: sum(r.state == "warm" for r in found.values()) == 3)


async def restored(tmp_path: Path, node: Node, store: Store) -> Store:
    """The store as it was before the node's last writes, which are an assignment."""
    net = await network(store, "10.64.0.0/24", warm=4)
    await node.start()
    await node.add(net, "c0")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 4)
    shutil.copy(tmp_path / "store.db", tmp_path / "backup.db")
    for suffix in ("-wal", "-shm"):
        if (tmp_path / f"store.db{suffix}").exists():
            shutil.copy(tmp_path / f"store.db{suffix}", tmp_path / f"backup.db{suffix}")
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 4)
    return await open_store(f"sqlite://{tmp_path}/backup.db")


async def test_a_restored_backup_is_noticed_and_everything_held_is_asserted(
    tmp_path: Path, store: Store, faulty: FaultyStore, node: Node, short_grace: float
) -> None:
    backup = await restored(tmp_path, node, store)
    net = await node.catalogue.network("prod")
    (extra,) = await node.add(net, "c2")
    await eventually(node.is_quiet)
    faulty.store = backup
    node.delete(extra)
    assigned = set(node.holder.assigned())
    found = await stored_when(
        backup, lambda found: {ip for ip, r in found.items() if r.state == "assigned"} == assigned
    )
    assert {found[ip].container_id for ip in assigned} == {"c0", "c1"}
    with pytest.raises(TryAgain, match="the store is in doubt"):
        await node.take(net, "10.64.0.99")
    await backup.close()


async def test_networks_created_in_a_restored_store_are_seen(
    tmp_path: Path, store: Store, faulty: FaultyStore, node: Node, short_grace: float
) -> None:
    backup = await restored(tmp_path, node, store)
    for i in range(20):
        await network(store, f"10.{100 + i}.0.0/24", name=f"lost-{i}")
    await eventually(lambda: len(node.catalogue.names()) == 21)
    faulty.store = backup
    node.delete(*node.holder.assigned())
    await eventually(lambda: node.catalogue.names() == ["prod"])
    await network(backup, "10.99.0.0/24", name="new")
    await eventually(lambda: node.catalogue.names() == ["new", "prod"])
    await backup.close()


async def test_a_lent_address_that_the_store_does_not_know_any_more_is_asserted(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=2)
    await node.start()
    (held,) = await node.take(net)
    await eventually(node.is_quiet)
    await delete(store, keys.address_key(held.ip))
    await node.holder.sync()
    others = [(await node.take(net))[0].ip for _ in range(70)]  # more than its block has
    assert held.ip not in others
    node.assign([held], "c1")
    await stored_when(store, lambda found: held.ip in found and found[held.ip].container_id == "c1")


async def test_a_lent_address_that_is_another_nodes_by_now_is_not_offered_again(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=1)
    await node.start()
    (held,) = await node.take(net)
    await eventually(node.is_quiet)
    kv = await store.get(keys.address_key(held.ip))
    assert kv is not None
    await store.txn(Txn(then=(Put(kv.key, Address.decode(kv.key, kv.value).with_(node="n2").encode()),)))
    await node.holder.sync()
    node.holder.put_back([held])
    taken = [(await node.take(net))[0].ip for _ in range(3)]
    assert held.ip not in taken


async def test_a_take_that_waits_while_one_of_its_addresses_is_lost_is_refused(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", "fd00:64::/64", warm=1)
    node.load()
    await node.holder.sync()
    asking = asyncio.create_task(node.take(net, "fd00:64::99"))
    await eventually(lambda: node.holder._holdings.asking)
    # One round of the upkeep: the IPv6 address is granted, for IPv4 there is only a block by now.
    changes = await node.holder._upkeep._gather()
    node.holder._upkeep._apply(changes, await node.holder._writer.commit([c.write for c in changes]))
    await asyncio.sleep(0.01)
    held = next(h for h in node.holder._shelf.held.values() if h.ip.version == 6 and h.lent)
    assert not asking.done()
    kv = await faulty.store.get(keys.address_key(held.ip))
    assert kv is not None
    theirs = Address.decode(kv.key, kv.value).with_(node="n2")
    await faulty.store.txn(Txn(then=(Put(kv.key, theirs.encode()),)))
    await node.holder.sync()
    node.serve()
    with pytest.raises(TryAgain, match="lost to another node"):
        await asking


async def test_an_assignment_of_a_lost_address_is_a_conflict_and_not_silently_kept(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=1)
    await node.start()
    (held,) = await node.take(net)
    await eventually(node.is_quiet)
    kv = await store.get(keys.address_key(held.ip))
    assert kv is not None
    await store.txn(Txn(then=(Put(kv.key, Address.decode(kv.key, kv.value).with_(node="n2").encode()),)))
    await node.holder.sync()
    node.assign([held], "c1")
    await eventually(lambda: [c.ip for c in node.conflicts] == [held.ip])


async def test_whoever_asks_by_name_is_answered_when_the_sync_finds_the_address_granted(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    node.load()
    await node.holder.sync()
    asking = asyncio.create_task(node.take(net, "10.64.0.9"))
    await eventually(lambda: node.holder._holdings.asking)
    changes = await node.holder._upkeep._gather()
    await node.holder._writer.commit([change.write for change in changes])
    await node.holder.sync()  # its outcome was never applied
    assert [str(held.ip) for held in await asyncio.wait_for(asking, PATIENCE)] == ["10.64.0.9"]


# -- a crash between the store's yes and the journal's


async def crash_after_the_next_commit(node: Node) -> None:
    """The group that is sent next lands, and the agent is killed before it learns of it."""
    landed = asyncio.Event()
    real = node.holder._writer.commit

    async def commit(writes: list[object]) -> object:
        await real(writes)
        landed.set()
        return await asyncio.Event().wait()

    node.holder._writer.commit = commit
    node.holder._holdings.wake.set()
    await asyncio.wait_for(landed.wait(), PATIENCE)
    await node.crash()


async def test_a_block_claimed_in_the_moment_of_a_crash_is_known_after_it(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=0, block_size=28)
    await node.start()
    await node.add(net, "c1")
    await eventually(node.is_quiet)
    taking = asyncio.gather(*(node.take(net) for _ in range(20)), return_exceptions=True)
    await asyncio.sleep(0)
    await crash_after_the_next_commit(node)
    taking.cancel()
    await node.start()
    blocks = {kv.key for kv in (await read_prefix(store, keys.BLOCKS))[0]}
    assert {keys.block_key(block) for block in node.holder._holdings.blocks} == blocks
    assert len(blocks) > 1


async def test_a_static_address_taken_in_the_moment_of_a_crash_is_not_leaked(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    await node.start()
    await node.add(net, "c1")  # so that the journal is not empty
    await eventually(node.is_quiet)
    outside = next(
        str(ip)
        for ip in ip_network("10.64.0.0/24").hosts()
        if not any(ip in block for block in node.holder._holdings.blocks)
    )
    taking = asyncio.create_task(node.take(net, outside))
    await asyncio.sleep(0)
    await crash_after_the_next_commit(node)
    taking.cancel()
    assert ip_address(outside) in await stored(store)
    await node.start()
    await stored_when(store, lambda found: ip_address(outside) not in found)


async def test_a_static_address_given_away_in_the_moment_of_a_crash_is_not_leaked(
    faulty: FaultyStore, node: Node
) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=0)
    await node.start()
    await node.add(net, "c1")
    outside = next(
        str(ip)
        for ip in ip_network("10.64.0.0/24").hosts()
        if not any(ip in block for block in node.holder._holdings.blocks)
    )
    (ip,) = await node.add(net, "c2", outside)
    await eventually(node.is_quiet)
    node.delete(ip)
    await eventually(lambda: node.is_quiet() and node.states().get("cooling") == 1)
    faulty.fault = lambda txn: "refused"
    await eventually(
        lambda: (held := node.holder.held(ip)) is not None and held.record is None and held.forgotten
    )
    await node.crash()
    faulty.fault = lambda txn: ""
    assert ip in await stored(faulty.store)
    await node.start()
    await stored_when(faulty.store, lambda found: ip not in found)


# -- records that cannot be read


async def test_an_unreadable_record_is_reported_left_alone_and_blocks_nothing(
    store: Store, node: Node
) -> None:
    net = await network(store, "10.64.0.0/28", warm=2)
    await node.start()
    (mine,) = await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 2)
    await node.crash()
    warm = next(ip for ip, r in (await stored(store)).items() if r.state == "warm")
    for ip in (mine, warm, ip_address("10.64.0.9")):
        await store.txn(Txn(then=(Put(keys.address_key(ip), b"{garbage"),)))
    await store.txn(Txn(then=(Put("addresses/4/no-address", b"{}"), Put("blocks/4/no-block", b"{}"))))
    report = await node.start()
    assert {keys.address_key(ip) for ip in (mine, warm, ip_address("10.64.0.9"))} <= report.unreadable.keys()
    assert mine in node.holder.assigned()
    taken = [(await node.add(net, f"x{i}"))[0] for i in range(11)]
    assert not {mine, warm, ip_address("10.64.0.9")} & set(taken)
    with pytest.raises(TryAgain, match="3 unreadable"):
        await node.take(net)
    node.delete(mine)
    await eventually(lambda: node.holder.held(mine) is None)
    kv = await store.get(keys.address_key(mine))
    assert kv is not None
    assert kv.value == b"{garbage"


async def test_unreadable_blocks_in_a_full_scan_block_nothing(store: Store, node: Node) -> None:
    net = await network(store, "10.64.0.0/24", warm=0)
    misaligned = Block(pool="10.64.0.0-24", size=20, node="n1", claimed_at=0.0)
    await store.txn(
        Txn(
            then=(
                Put(keys.BLOCKS + "4/zz", b"{}"),
                Put(keys.block_key(ip_network("10.64.0.64/26")), b"nonsense"),
                Put(keys.block_key(ip_network("10.64.0.128/26")), misaligned.encode()),
            )
        )
    )
    report = await node.start()
    assert len(report.unreadable) == 3
    assert await node.add(net, "c1")


# -- a journal that is older than the store


def copied(node: Node, tmp_path: Path) -> Callable[[], None]:
    """A copy of the journal as it is now; what is returned puts it back, once the agent was killed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in node.path.parent.glob(f"{node.path.name}*"):
        if not file.name.endswith("-shm"):
            shutil.copy(file, copy)

    def put_back() -> None:
        for file in node.path.parent.glob(f"{node.path.name}*"):
            file.unlink()
        for file in copy.iterdir():
            shutil.copy(file, node.path.parent)

    return put_back


async def test_a_journal_that_was_put_back_gives_nobody_what_the_store_has_as_another_containers(
    store: Store, new_node: NewNode, tmp_path: Path
) -> None:
    node = new_node(cooldown=60)
    net = await network(store, "10.64.0.0/24", warm=3)
    await node.start()
    (first,) = await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 3)
    put_back = copied(node, tmp_path)
    node.delete(first)
    new = []
    for number in range(3):
        new += await node.add(net, f"new-{number}")
        await eventually(node.is_quiet)
    await node.crash()
    put_back()
    node.live = set(new)
    report = await node.start()
    assert report.behind
    assert node.holder.assigned().keys() == set(new)
    found = await stored_when(store, lambda found: found[first].state == "cooling")
    assert {found[ip].container_id for ip in new} == {"new-0", "new-1", "new-2"}
    taken = [(await node.add(net, f"later-{number}"))[0] for number in range(3)]
    assert not {first, *new} & set(taken)


async def test_a_plain_crash_is_no_journal_that_was_put_back(faulty: FaultyStore, node: Node) -> None:
    net = await network(faulty.store, "10.64.0.0/24", warm=2)
    await node.start()
    (ip,) = await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 2)
    await node.add(net, "c2")
    await crash_after_the_next_commit(node)
    for _ in range(5):
        # However often a start gets no further than the fence.
        node.load()
        node.journal.note_attempt()
        assert await node.holder._writer.claim(node.journal.confirmed_seq)
        node.journal.close()
    report = await node.start()
    assert not report.behind
    assert {
        row.record.container_id for row in node.journal.load_addresses() if row.record.state == "assigned"
    } == {
        "c1",
        "c2",
    }
    assert ip in node.holder.assigned()


async def test_what_the_kernel_has_is_asserted_whatever_journal_and_store_say(
    store: Store, new_node: NewNode
) -> None:
    node = new_node(cooldown=60)
    net = await network(store, "10.64.0.0/24", warm=3)
    await node.start()
    await node.add(net, "c1")
    await eventually(lambda: node.is_quiet() and node.states().get("warm") == 3)
    warm = next(ip for ip, record in (await stored(store)).items() if record.state == "warm")
    absent = ip_address("10.64.0.99")
    await node.crash()
    node.load()
    node.holder.carry([warm, absent], "prod", Owner("c9", "eth0", "mesos", ("prod",)))
    assert warm not in [held.ip for held in node.holder._shelf.all_ready()]
    await node.holder.sync()
    node.serve()
    found = await stored_when(
        store, lambda found: {found[ip].container_id for ip in (warm, absent) if ip in found} == {"c9"}
    )
    assert [(found[ip].state, found[ip].pool) for ip in (warm, absent)] == [("assigned", "10.64.0.0-24")] * 2
