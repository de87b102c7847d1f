"""The node's name: chosen once, at the first start, and kept in the journal from then on.

In the store every address, block and container of this machine stands under the name. An agent that came back under
another one would find its own containers' addresses in somebody else's hands.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import structlog

from ipam.errors import InvalidInput
from ipam.keys import A_NODE_NAME, NODE_NAME
from isolator.errors import JournalUnwritable
from isolator.journal import Journal

log = structlog.get_logger(__name__)


def settle(journal: Journal, wanted: str, *, given: bool, state_dir: Path) -> str:
    """The name of this node: the journal's, if it has one, else ``wanted``, which it has from now on.

    given: whether somebody chose ``wanted``; else it is the host's. Raises InvalidInput when somebody chose another
    one than the journal's, or when the host's is to be the name and may not be.
    """
    known = _known(journal, wanted, given=given)
    if not known and not given:
        _refuse_unfit(wanted)
    if known and known != wanted:
        if given:
            raise InvalidInput(
                f"the state directory {state_dir} is node {known}'s, and this agent was told to be node {wanted}; "
                f"start it as {known}, or without a name; to rename the machine, have it give back what it has as "
                f"{known} (`moorage node drain {known}`, end its containers, stop it, `moorage node remove {known}`), "
                f"and start it as {wanted} with --state-dir {state_dir / wanted}"
            )
        log.warning(
            "the host has another name than the node, which keeps its own",
            node=known,
            host=wanted,
            state_dir=str(state_dir),
        )
    name = known or wanted
    if journal.node != name:
        try:
            journal.save_node(name)
        except JournalUnwritable as error:
            log.warning(
                "the node's name is not journalled; the next start looks again", node=name, why=str(error)
            )
    return name


def _refuse_unfit(host: str) -> None:
    if not NODE_NAME.fullmatch(host):
        raise InvalidInput(
            f"the host is called {host!r}, which cannot name a node: that takes {A_NODE_NAME}; name the node with "
            "--node or MOORAGE_NODE"
        )
    if host.partition(".")[0] == "localhost":
        raise InvalidInput(
            f"the host is called {host}, as every machine is that nobody named, and a node keeps its name; name the "
            "node with --node or MOORAGE_NODE"
        )


def _known(journal: Journal, wanted: str, *, given: bool) -> str:
    """What the journal says, or its addresses do where an earlier version wrote it; "" if nothing does."""
    if journal.node:
        return journal.node
    names = Counter(row.record.node for row in journal.load_addresses())
    if wanted in names and (given or len(names) == 1):
        return wanted
    return names.most_common(1)[0][0] if names else ""
