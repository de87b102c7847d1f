"""CHECK, as a runtime asks it: whatever of the firewall somebody took, it is named until it is back."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel

TAKEN = ("map ports6", "set nat4", "chain arriving", "chain leaving")
"""One of each kind; all of them are tried in tests/isolator/policy/test_looking.py."""


def test_a_check_names_what_is_missing_of_the_firewall(node: LabNode) -> None:
    mapping = {"hostPort": 31000, "containerPort": 80, "protocol": "tcp"}
    with node.container() as container:
        config = {
            "cniVersion": "1.0.0",
            "name": "web",
            "type": "moorage-cni",
            "socket": str(node.socket),
            "runtimeConfig": {"portMappings": [mapping]},
        }
        added = container.call("ADD", config)
        assert added.exit == 0, added.stdout
        checked = {**config, "prevResult": added.json}

        def check() -> str:
            answer = container.call("CHECK", checked)
            return answer.json["msg"] if answer.exit else ""

        for taken in TAKEN:
            eventually(lambda: not check())

            def named(taken: str = taken) -> bool:
                # The agent may have put it back in between.
                kind, name = taken.split()
                node.namespace.run("nft", "flush", kind, "inet", "moorage", name)
                return f"the firewall's {'chain' if kind == 'chain' else 'set'} {name} " in check()

            eventually(named)
