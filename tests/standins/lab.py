"""Mesos and Marathon on a lab: a master and a Marathon on the underlay, a Mesos agent on every node, a listener.

    with MesosLab(nodes=3, grace=5.0) as cluster:
        cluster.deploy({"id": "/web", "instances": 4, "networks": [{"mode": "container", "name": "web"}]})

Nodes, containers, agents, etcd and the listener are real; Marathon, master and Mesos agents are the stand-ins.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from ipam.errors import MoorageError
from moorage.lab import Lab, LabNode, Namespace, unique
from moorage.lab.switch import address
from tests.marathon.listening import Listening
from tests.standins.marathon import Marathon
from tests.standins.mesos_agent import PORT, HookAgent
from tests.standins.mesos_master import Master

NETWORK = "web"
POOL = "10.64.0.0/22"

HOST = 150
"""Host number of Marathon and the master on the underlay."""

_ASK = """
import sys, urllib.request
method, url, body = sys.argv[1:4]
request = urllib.request.Request(url, body.encode() or None, {"content-type": "application/json"}, method=method)
sys.stdout.write(urllib.request.urlopen(request, timeout=10).read().decode())
"""


class MesosLab(contextlib.ExitStack):
    """See the module's docstring. grace, interval, gone_after: the listener's, seconds. fabric: the network's."""

    def __init__(
        self,
        nodes: int,
        *,
        grace: float,
        interval: float = 2.0,
        gone_after: float = 10.0,
        fabric: str = "none",
    ) -> None:
        super().__init__()
        self.lab = Lab(nodes=nodes, etcd=1)
        self.services = Namespace(unique("mesos"))
        self.master = Master()
        self.marathon = Marathon(self.master, keepalive=2.0)
        self.agents: dict[str, HookAgent] = {}
        self._timing = (grace, interval, gone_after)
        self._fabric = fabric

    def __enter__(self) -> MesosLab:
        super().__enter__()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def _make(self) -> None:
        self.enter_context(self.lab)
        self.enter_context(self.services)
        self.lab.switch.plug(self.services, HOST)
        place = {"place": self.services.path, "host": address(HOST)}
        self.enter_context(self.master.instance(port=5050, **place))
        self.enter_context(self.marathon.instance(port=8080, **place))
        for node in self.lab.nodes:
            self.agents[node.name] = self.enter_context(HookAgent(self.master, node))
            self.start_agent(node)
        self.lab.nodes[0].cli(
            "network", "create", NETWORK, "--pool", POOL, "--block-size", "28", "--fabric", self._fabric
        )
        grace, interval, gone_after = self._timing
        self.listener = Listening(
            self.lab.etcd.url,
            [self.marathon_url],
            [self.master_url],
            self.lab.directory / "listener.log",
            grace=grace,
            interval=interval,
            gone_after=gone_after,
            keep_alive=2.0,
            within=self.services,
        )
        self.callback(self.listener.kill)
        self.listener.start()

    @property
    def marathon_url(self) -> str:
        return f"http://{address(HOST)}:8080"

    @property
    def master_url(self) -> str:
        return f"http://{address(HOST)}:5050"

    def node(self, name: str) -> LabNode:
        return next(node for node in self.lab.nodes if node.name == name)

    def start_agent(self, node: LabNode) -> None:
        """The moorage agent of a node, which asks the Mesos agent beside it."""
        node.start(MOORAGE_MESOS_AGENT_URL=f"http://{node.ip}:{PORT}")

    # -- as users and operators do it

    def ask(self, method: str, url: str, body: Any = None) -> str:
        """Ask Marathon or the master, from beside them. Raises CalledProcessError."""
        text = "" if body is None else json.dumps(body)
        return self.services.run(sys.executable, "-c", _ASK, method, url, text).stdout

    def deploy(self, app: dict[str, Any]) -> None:
        """POST /v2/apps."""
        self.ask("POST", f"{self.marathon_url}/v2/apps", app)

    def scale(self, app: str, instances: int) -> None:
        """PUT /v2/apps/APP."""
        self.ask("PUT", f"{self.marathon_url}/v2/apps{app}", {"instances": instances})

    def mark_gone(self, agent: str) -> None:
        """An operator tells the master that an agent never comes back."""
        call = {"type": "MARK_AGENT_GONE", "mark_agent_gone": {"agent_id": {"value": agent}}}
        self.ask("POST", f"{self.master_url}/api/v1", call)

    def power_off(self, name: str) -> None:
        """A machine is dead, with both its agents and all containers."""
        self.agents[name].power_off()
        node = self.node(name)
        node.kill()
        node.switch_off()

    def power_on(self, name: str, *, keeps_state: bool = True) -> None:
        """It has booted."""
        node = self.node(name)
        node.switch_on()
        self.start_agent(node)
        self.agents[name].power_on(keeps_state=keeps_state)

    # -- looking in

    def assigned(self) -> dict[str, dict[str, Any]]:
        """address -> what `moorage ip list` says, of those that are assigned."""
        return {row["address"]: row for row in self.lab.nodes[0].ask("ip", "list", "--state", "assigned")}

    def status(self) -> dict[str, Any]:
        """What `moorage marathon status` says; empty if no listener leads."""
        said = self.lab.nodes[0].cli("marathon", "status", "-o", "json", check=False).stdout
        found = json.loads(said) if said.strip().startswith("[") else []
        return dict(found[0]) if found else {}

    def live_addresses(self) -> dict[str, str]:
        """address -> container, of all namespaces that have a process."""
        found: dict[str, str] = {}
        for agent in self.agents.values():
            found |= agent.live_addresses()
        return found

    def running(self) -> int:
        """How many tasks of Marathon run."""
        return sum(task.state == "TASK_RUNNING" for task in list(self.marathon.tasks.values()))


def eventually(holds: Callable[[], bool], within: float) -> bool:
    """Whether it holds within so many seconds; what is away just now does not."""
    deadline = time.monotonic() + within
    while True:
        with contextlib.suppress(MoorageError):
            if holds():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
