"""The store's records: typed values, and JSON in and out.

A record read from the store keeps fields it does not know in ``unknown`` and writes them back, so an
old program never strips what a newer one wrote. ``v`` is the schema version of that record.
"""

from __future__ import annotations

import enum
from typing import Any, Self, cast

import msgspec

from ipam.errors import StoreError
from ipam.next_hops import NextHop


class Label(msgspec.Struct, frozen=True, omit_defaults=True):
    """A label as engines give it: keys may repeat, a value may be empty or missing."""

    key: str
    value: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all records; see the module's docstring."""

    v: int = 1
    unknown: dict[str, Any] = {}

    @classmethod
    def decode(cls, key: str, raw: bytes) -> Self:
        """Parse a stored value. Raises StoreError naming the key."""
        try:
            fields = msgspec.json.decode(raw, type=dict[str, Any])
            known = {k: fields.pop(k) for k in cls.__struct_fields__ if k != "unknown" and k in fields}
            return msgspec.convert({**known, "unknown": fields}, cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise StoreError(
                f"the store's key {key} holds no valid {cls.__name__.lower()} ({error}); "
                "restore it from a dump, or delete it if its node is gone"
            ) from error

    def encode(self) -> bytes:
        """The JSON to store."""
        fields = cast("dict[str, Any]", msgspec.to_builtins(self))
        unknown = fields.pop("unknown")
        return msgspec.json.encode({**unknown, **self._written(fields)})

    @staticmethod
    def _written(fields: dict[str, Any]) -> dict[str, Any]:
        """Those of its fields that are written."""
        return fields

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)


FABRICS = ("none", "hostgw", "vxlan")
"""How nodes reach each other's blocks: not through us; by routes via the nodes themselves, which have to be on one
segment; or in a tunnel over whatever connects them."""


class Network(Record, frozen=True, kw_only=True):
    """``networks/<name>``: what an app joins.

    pools: names of its pools, in the order addresses are taken from them.
    mtu: bytes; 0 derives it from the underlay.
    nat: masquerade traffic that leaves all pools.
    warm: addresses per family that an agent which uses the network keeps ready.
    preload: keep them ready even before the network is first used.
    strict: addresses nobody asked for by name come from a node's own blocks only, none are borrowed.
    fabric: how other nodes reach its containers, one of FABRICS.
    isolation, allow_from: who may call its containers; ipam/isolation.py.
    to_node: what of the nodes its containers reach that is kept from them otherwise; ipam/isolation.py. Its default is
    what a network's containers reached that was written before there was a choice.
    max_connections: that each container's interface may have tracked by its node; 0 leaves it to the node.
    allow_*, max_bandwidth: who may ask for what; ipam/permissions.py. Their defaults are what a network allows that was
    written before they were there: what worked then.
    next_hop: number of the next hop inside its containers (ipam/next_hops.py), chosen when it is created. The default
    is that of a network that was written before there was a choice.
    """

    name: str
    pools: list[str]
    driver: str = "routed"
    mtu: int = 0
    nat: bool = True
    dns: list[str] = []
    search: list[str] = []
    warm: int = 8
    preload: bool = False
    strict: bool = False
    fabric: str = "none"
    isolation: str = "netgroups"
    allow_from: list[str] = []
    to_node: list[str] = msgspec.field(default_factory=lambda: ["store"])
    max_connections: int = 0
    allow_netgroups: list[str] = msgspec.field(default_factory=lambda: ["*"])
    allow_public: bool = True
    allow_static: list[str] = msgspec.field(default_factory=lambda: ["all"])
    allow_mac: bool = True
    allow_hostports: list[str] = msgspec.field(default_factory=lambda: ["31000-32000"])
    max_bandwidth: int = 0
    next_hop: NextHop = 1


class Pool(Record, frozen=True, kw_only=True):
    """``pools/<name>``: a CIDR that addresses come from.

    block_size: prefix length of the blocks it is cut into.
    static: ranges ``first-last`` or CIDRs given only to who asks for an address by name.
    excluded: ranges never given to anybody.
    disabled: gives out nothing new; what is assigned stays.
    forced: gives out addresses of networks that nodes are connected to; what a node uses itself it never does.
    """

    name: str
    cidr: str
    network: str
    block_size: int
    static: list[str] = []
    excluded: list[str] = []
    disabled: bool = False
    forced: bool = False


class Block(Record, frozen=True, kw_only=True):
    """``blocks/<family>/<hex of base>``: a slice of a pool with affinity to one node."""

    pool: str
    size: int
    node: str
    claimed_at: float


NODE_ENGINE = "moorage"
"""The engine of addresses that no container has: those of the nodes' own fabric devices."""


OWN = "own"
"""What those are counted as, where addresses are counted by state."""


class AddressState(enum.StrEnum):
    """warm -> (allocated ->) assigned -> cooling -> warm or free (absent); the picture is in ipam/shelf.py.

    ALLOCATED: promised to a uid by an engine that asks for addresses before it has a container; ipam/allocations.py.
    """

    WARM = "warm"
    ALLOCATED = "allocated"
    ASSIGNED = "assigned"
    COOLING = "cooling"

    @property
    def is_taken(self) -> bool:
        """Whether somebody was told that such an address is theirs."""
        return self in (AddressState.ALLOCATED, AddressState.ASSIGNED)


_ALWAYS_WRITTEN = frozenset({"v", "pool", "state", "node"})


class Address(Record, frozen=True, kw_only=True):
    """``addresses/<family>/<hex of ip>``: one IP in use. Its IP is the key, and only the key.

    What is empty is not written: there may be hundreds of thousands.

    id: names one assignment; releases carry it, so a late one never frees a newer owner's address.
    netgroups: while it is warm, what other nodes take it for a member of already; ipam/stock.py.
    uid: whom an engine allocated it for. It stays while the address is assigned, until that engine releases it.
    former: while it is assigned or cools, the uid that has given it up; ipam/coming_back.py.
    since: wall clock, seconds, of the last change of state.
    endpoint: of the first address of an endpoint, what its node has to know of it and the other fields do not say, for
    a node that loses its journal (isolator/written.py). Nobody else reads it.
    """

    pool: str
    state: AddressState
    node: str
    id: str = ""
    container_id: str = ""
    ifname: str = ""
    network: str = ""
    engine: str = ""
    netgroups: list[str] = []
    labels: list[Label] = []
    app: str = ""
    task: str = ""
    framework: str = ""
    reservation: str = ""
    uid: str = ""
    former: str = ""
    since: float = 0.0
    endpoint: dict[str, Any] = {}

    @staticmethod
    def _written(fields: dict[str, Any]) -> dict[str, Any]:
        # What is left out is empty by default, in this version and in earlier ones.
        return {name: value for name, value in fields.items() if value or name in _ALWAYS_WRITTEN}

    @property
    def is_nodes_own(self) -> bool:
        """Whether it is the node's own address, no container's."""
        return self.state is AddressState.ASSIGNED and self.engine == NODE_ENGINE

    @property
    def is_withdrawn(self) -> bool:
        """Whether it cools although nobody had it: it was warm, and goes back to its pool."""
        return self.state is AddressState.COOLING and not (self.id or self.container_id)

    @property
    def use(self) -> str:
        """What it is counted as: its state, or OWN."""
        return OWN if self.is_nodes_own else self.state.value


class Reservation(Record, frozen=True, kw_only=True):
    """``reservations/<family>/<hex of ip>``: an IP kept for whoever presents its key."""

    key: str
    network: str
    note: str = ""


class Node(Record, frozen=True, kw_only=True):
    """``nodes/<name>``: facts about a node, written by its agent.

    underlay: its addresses on the network under the containers, IPv4 first, and as the last one its link-local
    one there, with which nodes on the same segment can route IPv6 without any address.
    mac, vxlan_port: of its VXLAN device; vtep: that one's addresses. "" and 0 if it has none.
    gateway: it joins the fabric and runs no containers.
    mesos_agent: the id of the Mesos agent there, "" if there is none, or nobody said how to ask it.
    drained: nothing is warm there, and nothing will be, until its agent says otherwise (ipam/drain.py).
    surroundings: what its own networks use, which no container gets; lines as in ipam/taken.py.
    machine_id: of the machine, derived from /etc/machine-id; state_id: of the agent's state directory. "" if there is
    none, or the agent is older than the field. They say whose the name is; ipam/namesakes.py.
    since: wall clock, seconds, of its first registration.
    """

    name: str
    version: str
    underlay: list[str] = []
    mac: str = ""
    vxlan_port: int = 0
    vtep: list[str] = []
    gateway: bool = False
    mtu: int = 0
    features: list[str] = []
    mesos_agent: str = ""
    drained: bool = False
    since: float = 0.0
    surroundings: list[str] = []
    machine_id: str = ""
    state_id: str = ""


class Alive(Record, frozen=True, kw_only=True):
    """``alive/<name>``: on a lease; there while the node's agent runs.

    incarnation: of the store, that the store has all of what the node holds in; "" before anybody doubted.
    state_id: of the agent's state directory, "" if an agent wrote it that has none yet.
    """

    instance: str
    boot_id: str
    incarnation: str = ""
    state_id: str = ""


class Incarnation(Record, frozen=True, kw_only=True):
    """``incarnation``: moved by whoever doubts that the store goes on from where it was; ipam/continuity.py.

    by: whoever moved it. why: what it found of the store. since: wall clock, seconds.
    """

    id: str
    by: str
    why: str
    since: float = 0.0


class Vouched(Record, frozen=True, kw_only=True):
    """``vouched``: where the store's history stood when a node last knew it to be right.

    cluster, term, surplus: as in ipam/store/base.py `Standing`. by: the node.
    """

    cluster: str
    term: int
    surplus: int
    by: str


class Fence(Record, frozen=True, kw_only=True):
    """``writers/<name>``: who may write for the node, and how far it got.

    vacant: an operator took it away from its agent: whoever starts next under the name has it, one that
    runs already has not (`moorage node adopt`).
    """

    instance: str
    boot_id: str
    seq: int
    vacant: bool = False


class IntentKind(enum.StrEnum):
    """What is asked of a node's agent."""

    VERIFY = "verify"
    LABELS = "labels"
    RELEASE = "release"
    GIVE_BACK = "give-back"
    CHECK = "check"
    DRAIN = "drain"
    RETURN_BLOCK = "return-block"
    TRACE = "trace"


class Intent(Record, frozen=True, kw_only=True):
    """``intents/<node>/<uuid>``: a request to one node's agent, on a lease; the agent adds ``answer``.

    id, mod_revision: the address as the asker saw it; the agent acts only if both still match.
    expires: for agents of earlier versions; ipam/intents.py.
    """

    kind: IntentKind
    ip: str = ""
    id: str = ""
    mod_revision: int = 0
    evidence: dict[str, Any] = {}
    expires: float = 0.0
    answer: dict[str, Any] | None = None
