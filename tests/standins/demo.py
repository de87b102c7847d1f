"""`make marathon-demo`: stale addresses found and released while you watch, in about a minute.

Three nodes with real agents, an etcd and a listener, inside this machine; Marathon, the Mesos master and the Mesos
agents are stand-ins (README.md), whose containers are real processes in real namespaces. It is here and not in
moorage/lab because of them: packages never import tests.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from moorage.lab import labs
from moorage.lab.ticks import eventually, expect, perform, show, step
from tests.standins.lab import NETWORK, MesosLab
from tests.standins.mesos_agent import HookAgent

GRACE = 10.0
APP = "/web"
INSTANCES = 6

PATIENCE = 60.0
"""Seconds that a step may take: a dead node's sign of life alone lasts 15 s."""


def main() -> int:
    """Run the demo; 0 if every step holds."""
    code = perform("sudo make marathon-demo", _demo)
    if code == 0:
        print(
            "\nOn your cluster: moorage marathon listen --url http://MARATHON:8080 --mesos-master http://MASTER:5050"
        )
    return code


def _demo(stack: contextlib.ExitStack, made: list[Path]) -> None:
    """made: gets the path of every file and namespace that has to be gone afterwards."""
    labs.require_programs()
    print(
        "\nmoorage marathon: three nodes, an etcd, and Mesos and Marathon as stand-ins, inside this machine\n"
    )
    cluster = MesosLab(nodes=3, grace=GRACE)
    made += [cluster.lab.directory, cluster.services.path]
    made += [node.namespace.path for node in cluster.lab.nodes]
    with step("three nodes, a Mesos agent beside each, Marathon, and `moorage marathon listen`"):
        stack.enter_context(cluster)
        eventually(
            lambda: cluster.status().get("phase") == "steady", "no listener is steady", within=PATIENCE
        )

    with step(f"an app of {INSTANCES} instances, deployed through Marathon: every task has its own address"):
        networks = [{"mode": "container", "name": NETWORK}]
        cluster.deploy({"id": APP, "cmd": "sleep 100000", "instances": INSTANCES, "networks": networks})
        eventually(lambda: cluster.running() == INSTANCES, "not every task runs", within=PATIENCE)
    with step("each node's agent has asked its Mesos agent which task an address is for"):
        eventually(lambda: _known(cluster) == INSTANCES, "addresses without a task are left", within=PATIENCE)
    _list(cluster)

    _lost_del(cluster)
    _dead_node(cluster)
    with step("moorage ip check finds nothing"):
        eventually(lambda: _is_clean(cluster), "addresses, journals and kernels do not agree", within=30)


def _lost_del(cluster: MesosLab) -> None:
    """The hook is never called for a container that ends; nothing on its node knows."""
    agent, ip = _next_to_go(cluster)
    with step(
        f"scaled to {INSTANCES - 1}; the task ends, and on {agent.hostname} its DEL is lost on purpose"
    ):
        agent.lose_dels = 1
        cluster.scale(APP, INSTANCES - 1)
        eventually(lambda: bool(agent.lost), "no DEL was lost", within=PATIENCE)
        expect(cluster.running() == INSTANCES - 1, "Marathon did not scale the app down")
        expect(ip in cluster.assigned(), f"{ip} is not assigned any more")
        expect(ip not in cluster.live_addresses(), f"something still lives on {ip}")
    with step(f"the listener has noticed: {ip} is stale"):
        eventually(lambda: _count(cluster, "stale") == 1, "it did not notice", within=PATIENCE)
    show("$ moorage marathon status", _cli(cluster, "marathon", "status"))
    with step(f"after {GRACE:.0f} s of grace {agent.hostname} has looked, found no process, and released it"):
        eventually(lambda: ip not in cluster.assigned(), f"{ip} is still assigned", within=PATIENCE)
        agent.lost[0].hooked.namespace.delete()
        agent.lost.clear()
    with step("all others kept theirs"):
        expect(_lives(cluster), "the other addresses are not what lives")


def _dead_node(cluster: MesosLab) -> None:
    """What cannot be reached may well be alive; what is gone is not."""
    agent = max(cluster.agents.values(), key=lambda agent: len(agent.containers))
    name, mesos_id = agent.hostname, agent.id
    held = {ip for container in agent.containers.values() for ip in container.addresses}
    with step(
        f"{name} does not answer any more; Mesos gives its tasks up as unreachable, Marathon replaces them"
    ):
        cluster.power_off(name)
        cluster.master.lose(mesos_id)
        for task in [t for t, known in list(cluster.marathon.tasks.items()) if known.agent == mesos_id]:
            cluster.marathon.replace(task)
        eventually(lambda: cluster.running() == INSTANCES - 1, "the tasks are not replaced", within=PATIENCE)
    with step(f"nobody knows whether it is dead: its {len(held)} addresses are kept"):
        eventually(
            lambda: _count(cluster, "unreachable") == len(held), "not shown as unreachable", within=PATIENCE
        )
        eventually(lambda: not _node_lives(cluster, name), f"{name} still counts as alive", within=PATIENCE)
        expect(held <= cluster.assigned().keys(), "some of its addresses are not assigned any more")
    show("$ moorage marathon status", _cli(cluster, "marathon", "status"))
    with step(
        f"an operator tells the master that {name} is gone (MARK_AGENT_GONE): everything it held is free"
    ):
        cluster.mark_gone(mesos_id)
        eventually(lambda: not held & cluster.assigned().keys(), "they are still assigned", within=PATIENCE)
        eventually(lambda: name not in _nodes(cluster), f"{name} is still known", within=PATIENCE)
    _list(cluster)
    with step("all others kept theirs"):
        expect(_lives(cluster), "the other addresses are not what lives")


def _next_to_go(cluster: MesosLab) -> tuple[HookAgent, str]:
    """The agent and address of the instance that Marathon ends when it scales down by one."""
    last = max(cluster.marathon.tasks.values(), key=lambda task: task.instance)
    agent = next(agent for agent in cluster.agents.values() if agent.id == last.agent)
    container = agent.of_task(last.info.id)
    assert container is not None
    return agent, container.addresses[0]


def _known(cluster: MesosLab) -> int:
    """How many assigned addresses say which task they are for."""
    return sum(bool(row["task"]) for row in cluster.assigned().values())


def _count(cluster: MesosLab, verdict: str) -> int:
    return int(cluster.status().get("counts", {}).get(verdict, 0))


def _lives(cluster: MesosLab) -> bool:
    """Whether what is assigned is what lives, and nothing else."""
    return cluster.assigned().keys() == cluster.live_addresses().keys()


def _nodes(cluster: MesosLab) -> dict[str, bool]:
    """name -> whether its agent runs."""
    return {row["name"]: row["alive"] for row in cluster.lab.nodes[0].ask("node", "list")}


def _node_lives(cluster: MesosLab, name: str) -> bool:
    return _nodes(cluster)[name]


def _is_clean(cluster: MesosLab) -> bool:
    return cluster.lab.nodes[0].cli("ip", "check", check=False).returncode == 0


def _list(cluster: MesosLab) -> None:
    show("$ moorage ip list --state assigned", _cli(cluster, "ip", "list", "--state", "assigned"))


def _cli(cluster: MesosLab, *words: str) -> str:
    return cluster.lab.nodes[0].cli(*words).stdout


if __name__ == "__main__":
    sys.exit(main())
