"""Whose a node's name is: this machine's, another's, or that of a copy of this machine.

    state id     made with the journal, and kept in it     the same in every copy of the state directory
    machine id   the system's and the hardware's           the same in a copy that says the hardware is the same
    boot id      the kernel's                              of one machine, until it boots again
    instance     of one run of an agent                    the journal knows those that wrote what it holds

The node's record has the first two, its sign of life and its fence the others. Two machines may have one name: another
one takes it over when it starts while no agent of that name is alive, which is how machines are replaced. That is told,
and so is a copy; and what the store has of the other one's containers stays theirs until somebody says that they have
ended. One that starts while the other is alive is refused, and does not take the name by itself when that one's agent
is away for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from ipam import keys
from ipam.errors import ANEW, Fenced, StoreError
from ipam.membership import LEASE
from ipam.records import Alive, Fence, Node
from ipam.store.base import Store

log = structlog.get_logger(__name__)

LEFT_OVER = LEASE + 5.0
"""Seconds in which a sign of life may be that of an agent that has ended: its lease, and some patience."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one agent's machine, state directory and run; "" where it is not known. known: the instances that wrote what
    its journal holds, () if the journal is new. journals_machine: the one whose agent wrote the journal last."""

    machine_id: str = ""
    state_id: str = ""
    boot_id: str = ""
    instance: str = ""
    known: Collection[str] = ()
    journals_machine: str = ""

    @property
    def is_moved(self) -> bool:
        """Whether the journal is from another machine."""
        return bool(self.journals_machine and self.machine_id) and self.journals_machine != self.machine_id


class Namesakes:
    """See the module's docstring. told: sentences about others that have, or had, this node's name. lost_journal: the
    journal is new, and the node was this machine's before.

    addresses: this node's on its underlay now.
    elsewhere: containers that the store, or a journal that was copied, has on this node may live on another machine.
    lost_in_this_boot: this machine's agent wrote for the node in this very boot, and its journal is lost.
    """

    def __init__(
        self, store: Store, node: str, me: Identity, addresses: Callable[[], Collection[str]] = lambda: ()
    ) -> None:
        self.elsewhere = me.is_moved
        self.lost_in_this_boot = False
        self.lost_journal = False
        self._before: list[str] = []
        self._beside = ""
        self._store = store
        self._node = node
        self._me = me
        self._addresses = addresses
        self._seen_alive: dict[str, float] = {}
        self._other_seen: float | None = None
        self._refused = ""

    @property
    def told(self) -> list[str]:
        return [self._beside] if self._beside else list(self._before)

    def settled(self) -> None:
        """This agent has the name, so nobody has it beside it; and what was another's is looked after."""
        self._beside = ""
        self.elsewhere = self.lost_in_this_boot = False

    async def look(self) -> None:
        """Before the name's fence is taken: who had it since this journal was written. Raises Fenced when another
        machine has it, StoreError."""
        fence = await self._fence()
        if fence is None or not fence.boot_id:
            self._refused = ""  # an operator said that nobody has the name
            return
        if self._refused:
            raise Fenced(self._refused)
        record = await self._own_record()
        if record is None or not record.state_id:
            return  # an agent that is older than the fields
        is_this_boot = fence.boot_id == self._me.boot_id
        if self._is_other_machine(record) and not is_this_boot:
            self.elsewhere = True
            copied = " and has a copy of this state directory" if self._is_same_state(record) else ""
            self._tell(
                f"node {self._node} was another machine{copied} (instance {fence.instance}) until now, whose agent "
                "does not run at this moment: if it was replaced by this one, or is this one with other hardware, end "
                "what the store has of its containers (`moorage endpoint missing --release`); if it goes on, stop this "
                f"agent, and start it under another name, {ANEW}"
            )
            return
        if fence.instance in (self._me.instance, *self._me.known):
            return
        if self._is_same_state(record):
            if self._me.known:
                self.elsewhere = self.elsewhere or not is_this_boot
                self._tell(
                    f"an agent with a copy of this state directory (instance {fence.instance}) has written for node "
                    f"{self._node} since this one did: if there is a clone of this machine, stop its agent, and give "
                    'the clone a state directory, a machine id and a name of its own (docs/runbook.md, "Two machines '
                    'have one name"); if the journal was put back from a copy, nothing is to be done'
                )
        else:
            self.lost_journal = not self._me.known and self._is_same_machine(record)
            self.lost_in_this_boot = is_this_boot and not self._me.known
            log.info("the name was this machine's, with another state directory", node=self._node)

    def _tell(self, sentence: str) -> None:
        if sentence not in self._before:
            self._before.append(sentence)
            log.warning("another agent had this node's name", node=self._node, why=sentence)

    async def refusal(self, *, had_name: bool) -> str:
        """Why this agent does not get the name: who runs under it, if that is another machine; "" if none does.

        had_name: whether it had it since it started; who never had is refused for good when the other one stays. Raises
        StoreError.
        """
        self._beside = ""
        alive = await self._alive(self._node)
        if alive is None or alive.instance == self._me.instance or alive.boot_id == self._me.boot_id:
            self._other_seen = None
            return ""
        sentence = await self._refusal_by(alive)
        now = asyncio.get_running_loop().time()
        if self._other_seen is None:
            self._other_seen = now
        elif now > self._other_seen + LEFT_OVER and not had_name:
            # Not what a machine leaves behind that boots, so it may be away for a moment, and its containers live.
            self._refused = (
                f"{sentence}; this agent does not take the name when the other one's is away: restart it when it has "
                f"the name for good, or run `moorage node adopt {self._node}`"
            )
        return self._refused or sentence

    async def _refusal_by(self, alive: Alive) -> str:
        record = await self._own_record()
        whose = f"another agent runs as node {self._node} (instance {alive.instance})"
        if record is not None and self._is_same_state(record):
            machine = " and machine id" if self._is_same_machine(record) else ""
            sentence = (
                f"{whose}, with a copy of this machine's state directory{machine}: one of the two is a clone; stop its "
                'agent, give it a state directory, a machine id and a name of its own (docs/runbook.md, "Two machines '
                'have one name"), and start it again'
            )
            self._beside = sentence
            return sentence
        if record is not None and record.machine_id and self._is_same_machine(record):
            return (
                f"{whose}, on a machine with this one's machine id: one of the two is a clone; give it a machine id "
                f"and a name of its own, and start it {ANEW}"
            )
        return f"{whose}; stop it, or start this one under another name, {ANEW}"

    async def is_this_machine(self, name: str) -> bool | None:
        """Whether a node of the store is this very machine, under another name or this one.

        None while the sign of life of such a node may be left over from an agent that has ended: ask again. Raises
        StoreError.
        """
        if name == self._node:
            return True
        record, alive = await self._record(name), await self._alive(name)
        if record is not None and not self._looks_like_this(record):
            return False
        if alive is None:
            self._seen_alive.pop(name, None)
            return True
        now = asyncio.get_running_loop().time()
        return None if now < self._seen_alive.setdefault(name, now) + LEFT_OVER else False

    def _looks_like_this(self, record: Node) -> bool:
        if self._is_same_machine(record) or self._is_same_state(record):
            return True
        if not record.underlay:
            # It shares with no other machine. Where its agent was older than the fields, it says nothing.
            return not (record.machine_id or record.state_id)
        # A machine that lost its journal, and got another id, has its addresses.
        return not set(record.underlay).isdisjoint(self._addresses())

    def _is_other_machine(self, record: Node) -> bool:
        return bool(self._me.machine_id and record.machine_id) and record.machine_id != self._me.machine_id

    def _is_same_machine(self, record: Node) -> bool:
        return bool(self._me.machine_id) and record.machine_id == self._me.machine_id

    def _is_same_state(self, record: Node) -> bool:
        return bool(self._me.state_id) and record.state_id == self._me.state_id

    async def _own_record(self) -> Node | None:
        """None also if it cannot be read: it is written anew."""
        kv = await self._store.get(keys.NODES + self._node)
        with contextlib.suppress(StoreError):
            return None if kv is None else Node.decode(kv.key, kv.value)
        return None

    async def _record(self, name: str) -> Node | None:
        kv = await self._store.get(keys.NODES + name)
        return None if kv is None else Node.decode(kv.key, kv.value)

    async def _alive(self, name: str) -> Alive | None:
        kv = await self._store.get(keys.ALIVE + name)
        return None if kv is None else Alive.decode(kv.key, kv.value)

    async def _fence(self) -> Fence | None:
        kv = await self._store.get(keys.WRITERS + self._node)
        return None if kv is None else Fence.decode(kv.key, kv.value)
