"""Who may send what to whom: the nft table ``inet moorage`` (its text and a packet's path: ruleset.py).

policy = Policy()
policy.set_surroundings(Surroundings(pools=(ip_network("10.0.0.0/16"),)))
policy.restore([Admission("mrgk2j…", "0a:58:0a:00:00:05", (ip,), "web", ("web",))])
policy.admit(Admission("mrgq7x…", ...))      # before its links go up
policy.revoke(["mrgq7x…"])                   # after its route is withdrawn
"""

from isolator.policy.book import Admission, Hosts, Surroundings
from isolator.policy.callers import NETGROUPS, Isolation, Verdict, isolation_of
from isolator.policy.table import Policy

__all__ = [
    "NETGROUPS",
    "Admission",
    "Hosts",
    "Isolation",
    "Policy",
    "Surroundings",
    "Verdict",
    "isolation_of",
]
