"""The lab: real nodes and containers in network namespaces of this machine, for tests, demos and the curious.

Everything it makes carries the ``mrg`` prefix and lives in namespaces and directories of its own. Used as
contexts, its parts are gone when the context ends, also when that is an error or an interrupt; a standing
lab (labs.py, ``moorage lab``) goes on until it is taken down. It never touches the machine's own
networking, nor an agent that is installed beside it.
"""

from moorage.lab.cluster import Lab
from moorage.lab.container import Answer, Container
from moorage.lab.etcd import EtcdCluster, Files, Member, Tls
from moorage.lab.namespace import Namespace, unique
from moorage.lab.node import LabNode
from moorage.lab.proxy import DelayingProxy
from moorage.lab.switch import Switch

__all__ = [
    "Answer",
    "Container",
    "DelayingProxy",
    "EtcdCluster",
    "Files",
    "Lab",
    "LabNode",
    "Member",
    "Namespace",
    "Switch",
    "Tls",
    "unique",
]
