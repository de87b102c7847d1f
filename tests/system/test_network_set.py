"""Networks changed while containers use them."""

from __future__ import annotations

import pytest

from moorage.lab import LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


def masqueraded(node: LabNode) -> bool:
    table = node.namespace.run("nft", "list", "table", "inet", "moorage").stdout
    (nat,) = [part for part in table.split("set ") if part.startswith("nat4")]
    return "10.64.0.0/16" in nat


def test_a_change_holds_for_new_containers_and_the_firewall_at_once(node: LabNode) -> None:
    with node.container() as old, node.container() as new:
        kept = old.add("web").ips
        eventually(lambda: masqueraded(node))
        node.cli("network", "set", "web", "--mtu", "1400", "--dns", "10.0.0.2", "--no-nat")
        eventually(lambda: not masqueraded(node))
        node.cli("network", "set", "web", "--add-pool", "10.65.0.0/24", "--disable-pool", "10.64.0.0/16")
        eventually(
            lambda: (
                {row["state"] for row in node.ask("ip", "list") if row["address"].startswith("10.64.")}
                == {"assigned"}
            )
        )
        added = new.add("web")
        assert str(added.ips[4]).startswith("10.65.0.")
        assert added.json["dns"]["nameservers"] == ["10.0.0.2"]
        assert "mtu 1400" in new.namespace.run("ip", "link", "show", "eth0").stdout
        assert "mtu 1500" in old.namespace.run("ip", "link", "show", "eth0").stdout
        assert node.namespace.pings(kept[4])
        assert old.namespace.pings(added.ips[4])
        assert node.cli("ip", "check").returncode == 0
        old.delete("web")
        new.delete("web")
