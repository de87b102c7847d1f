"""Whose a node's name is: this machine's, another's, or that of a copy of this machine.

    state id     made with the journal, and kept in it     the same in every copy of the state directory
    machine id   from /etc/machine-id                      the same in every copy of the system's disk
    boot id      the kernel's                              of one machine, until it boots again
    instance     of one run of an agent                    the journal knows those that wrote what it holds

The node's record has the first two, its sign of life and its fence the others. Two machines may have one name: another
one takes it over when its agent is not alive, which is how machines are replaced. That is told, and so is a copy.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from ipam import keys
from ipam.errors import ANEW, StoreError
from ipam.membership import LEASE
from ipam.records import Alive, Fence, Node
from ipam.store.base import Store

log = structlog.get_logger(__name__)

LEFT_OVER = LEASE + 5.0
"""Seconds in which a sign of life may be that of an agent that has ended: its lease, and some patience."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Of one agent's machine, state directory and run; "" where it is not known. known: the instances that wrote what
    its journal holds, () if the journal is new."""

    machine_id: str = ""
    state_id: str = ""
    boot_id: str = ""
    instance: str = ""
    known: Collection[str] = ()


class Namesakes:
    """See the module's docstring. told: sentences about others that have, or had, this node's name. lost_journal: the
    journal is new, and the node was this machine's before.

    addresses: this node's on its underlay now.
    """

    def __init__(
        self, store: Store, node: str, me: Identity, addresses: Callable[[], Collection[str]] = lambda: ()
    ) -> None:
        self.lost_journal = False
        self._before: list[str] = []
        self._beside = ""
        self._store = store
        self._node = node
        self._me = me
        self._addresses = addresses
        self._seen_alive: dict[str, float] = {}

    @property
    def told(self) -> list[str]:
        return [self._beside] if self._beside else list(self._before)

    def settled(self) -> None:
        """This agent has the name, so nobody has it beside it."""
        self._beside = ""

    async def look(self) -> None:
        """Before the name's fence is taken: who had it since this journal was written. Raises StoreError."""
        fence = await self._fence()
        if fence is None or not fence.boot_id or fence.instance in (self._me.instance, *self._me.known):
            return
        record = await self._own_record()
        if record is None or not record.state_id:
            return  # an agent that is older than the fields
        if self._is_same_state(record):
            if self._me.known:
                self._tell(
                    f"an agent with a copy of this state directory (instance {fence.instance}) has written for node "
                    f"{self._node} since this one did: if there is a clone of this machine, stop its agent, and give "
                    'the clone a state directory, a machine id and a name of its own (docs/runbook.md, "Two machines '
                    'have one name"); if the journal was put back from a copy, nothing is to be done'
                )
        elif self._is_same_machine(record):
            self.lost_journal = not self._me.known
            log.info("the name was this machine's, with another state directory", node=self._node)
        else:
            self._tell(
                f"node {self._node} was another machine (instance {fence.instance}) until now, whose agent does not "
                "run any more: if that one was replaced by this, nothing is to be done; if it goes on, stop this "
                f"agent, and start it under another name, {ANEW}"
            )

    def _tell(self, sentence: str) -> None:
        if sentence not in self._before:
            self._before.append(sentence)
            log.warning("another agent had this node's name", node=self._node, why=sentence)

    async def refusal(self) -> str:
        """Why this agent does not get the name: who runs under it, if that is another machine; "" if none does.

        Raises StoreError.
        """
        self._beside = ""
        alive = await self._alive(self._node)
        if alive is None or alive.instance == self._me.instance or alive.boot_id == self._me.boot_id:
            return ""
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
        if record.machine_id or record.state_id:
            return self._is_same_machine(record) or self._is_same_state(record)
        # Its agent was older than the fields. One without an underlay says nothing, and shares with no other machine.
        return not record.underlay or not set(record.underlay).isdisjoint(self._addresses())

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
