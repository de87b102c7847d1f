"""Who may send what to whom: the nft table ``inet moorage`` (its text and a packet's path: ruleset.py).

policy = Policy()
policy.restore([("mrgk2j…", [ip])], pools=[ip_network("10.0.0.0/16")], nat_pools=[])
policy.admit("mrgq7x…", [ip])      # before its links go up
policy.revoke("mrgq7x…", [ip])     # after its route is withdrawn
"""

from isolator.policy.table import Policy

__all__ = ["Policy"]
