"""`make demo`: moorage on one node, with real containers, in about ten seconds.

The node is a namespace of its own with an agent in it; the hook is executed as a Mesos agent executes it.
Nothing of the machine's own networking, nor of an agent that runs on it, is touched.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moorage.lab import mortal
from moorage.lab.container import Container
from moorage.lab.modules import ModulesContainer
from moorage.lab.node import LabNode
from moorage.lab.ticks import eventually, expect, perform, show, step, succeed

STATIC_IP = "10.64.0.77"

SERVER = """
import http.server, socket
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"hello from the container")
    def log_message(self, *_): pass
Server(("::", 8080), Hello).serve_forever()
"""

FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=5).read().decode())"


def fetch(namespace: Callable[..., list[str]], url: str) -> None:
    """GET ``url`` from a namespace and compare what comes."""
    result = subprocess.run(
        namespace(sys.executable, "-c", FETCH, url), text=True, capture_output=True, check=False
    )
    expect("hello from the container" in result.stdout, f"no answer from {url}: {result.stderr[-300:]}")


def main() -> int:
    """Run the demo; 0 if every step holds."""
    code = perform("sudo make demo", _demo)
    if code == 0:
        print(
            "\nThat was moorage on one machine. A cluster inside it: sudo make lab-demo. For Mesos: README.md."
        )
    return code


def _demo(stack: contextlib.ExitStack, made: list[Path]) -> None:
    """made: gets the path of every file and namespace that has to be gone afterwards."""
    print("\nmoorage: every container its own IP, on a node in a namespace of its own\n")
    with step("a node, with the embedded store and an agent"):
        orders = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrg-demo-")))
        node = stack.enter_context(LabNode("demo", agent=mortal.command(orders)))
        made += [orders, node.directory, node.namespace.path]
        node.start()
    network = (
        f"network create web --pool 10.64.0.0/16 --pool fd64::/64 --static {STATIC_IP} --allow-netgroup *"
    )
    with step(f"a dual-stack network: moorage {network}"):
        node.cli(*network.split())

    names = ("web", "client", "static", "red", "blue", "late", "refused")
    containers = [stack.enter_context(node.container(name)) for name in names]
    made += [container.namespace.path for container in containers]
    web, client, static, red, blue, late, refused = containers
    with step("a container 'web', its hook called as Mesos calls it"):
        ips = succeed(web.add("web", labels={"role": "frontend"})).ips
    with step("a container 'client'"):
        succeed(client.add("web"))
    with step(f"a container 'static' that asks for {STATIC_IP} by label"):
        given = succeed(static.add("web", labels={"moorage.ip": STATIC_IP})).ips
        expect(given[4] == STATIC_IP, f"got {given[4]}")
    with step(f"HTTP from client to web at {ips[4]} and [{ips[6]}], and from the node"):
        server = web.namespace.start(sys.executable, "-c", SERVER)
        stack.callback(server.wait)
        stack.callback(server.kill)
        eventually(lambda: _serves(web), "the server in the container did not start")
        for place in (client.namespace.command, node.namespace.command):
            fetch(place, f"http://{ips[4]}:8080/")
            fetch(place, f"http://[{ips[6]}]:8080/")

    with step("two containers in the netgroups red and blue do not reach each other, nor web"):
        succeed(red.add("web", labels={"moorage.netgroups": "red"}))
        of_blue = succeed(blue.add("web", labels={"moorage.netgroups": "blue"})).ips
        _expect_apart(red, of_blue)
        _expect_apart(red, ips)
    said = node.cli("policy", "test", red.id, of_blue[4], check=False)
    expect(said.returncode == 1, "moorage policy test does not say that it is denied")
    show(f"$ moorage policy test {red.id} {of_blue[4]}", said.stdout)
    with step("blue joins red while it runs: moorage endpoint set-netgroups; now they do"):
        node.cli("endpoint", "set-netgroups", blue.id, "blue", "red")
        for family in (4, 6):
            expect(red.namespace.pings(of_blue[family]), f"{of_blue[family]} does not answer")
    with step("red lies about its address, and web hears nothing of it"):
        heard = _received(web)
        for family, ip in given.items():
            red.namespace.run("ip", "address", "add", f"{ip}/{32 if family == 4 else 128}", "dev", "eth0")
            red.namespace.run(
                "ping", "-n", "-c", "3", "-i", "0.1", "-W", "1", "-I", ip, ips[family], check=False
            )
        expect(_received(web) == heard, "a packet with a spoofed source arrived")

    show("$ moorage ip list --state assigned", node.cli("ip", "list", "--state", "assigned").stdout)
    show("$ moorage endpoint list", node.cli("endpoint", "list").stdout)

    with step("the agent is killed (kill -9) in the middle of an ADD; its hook waits for the next agent"):
        late_ips = _add_across_a_kill(node, orders, late)
        expect(client.namespace.pings(late_ips[4]), f"{late_ips[4]} does not answer")
        expect(client.namespace.pings(late_ips[6]), f"{late_ips[6]} does not answer")
    with step("a wrong request is refused in one sentence"):
        answer = refused.add("web", labels={"moorage.ip": STATIC_IP})
        expect(answer.exit != 0 and static.id in answer.stdout, answer.stdout)
    print(f"    {answer.json['msg']}")

    _old_mesos(stack, node, client, made)
    with step("all six containers are deleted"):
        for container in (web, client, static, red, blue, late):
            answer = container.delete("web")
            expect((answer.exit, answer.stdout) == (0, ""), answer.stdout)
        eventually(lambda: not node.ask("endpoint", "list"), "endpoints are left")
        eventually(lambda: not _links(node), f"interfaces are left: {_links(node)}")
        eventually(lambda: not node.ask("ip", "list", "--state", "assigned"), "addresses are left")
    with step("moorage ip check finds nothing"):
        node.cli("ip", "check")
    with step("the agent ends in order"):
        expect(node.stop() == 0, "the agent did not end with 0")


def _old_mesos(stack: contextlib.ExitStack, node: LabNode, client: Container, made: list[Path]) -> None:
    """A container through the net-modules protocol, from its addresses to its end."""
    old = stack.enter_context(ModulesContainer(node.socket, "old", network="web"))
    made.append(old.namespace.path)
    with step("a container of an old Mesos agent: moorage-netmodules, allocate and isolate"):
        given = old.allocate()
        expect(given["error"] is None, str(given["error"]))
        ips = given["ipv4"] + given["ipv6"]
        _done(old.isolate(ips))
        for ip in ips:
            expect(client.namespace.pings(ip), f"{ip} does not answer")
    with step("its addresses are released first, as that agent does, and stay its own until its cleanup"):
        _done(old.release())
        expect(client.namespace.pings(ips[0]), f"{ips[0]} does not answer any more")
        _done(old.cleanup())
        _expect_apart(client, dict(enumerate(ips)))


def _done(answer: dict[str, Any]) -> None:
    expect(answer["error"] is None, str(answer["error"]))


def _add_across_a_kill(node: LabNode, orders: Path, container: Container) -> dict[int, str]:
    """Have the agent killed when the address is journalled and the interface is not there yet."""
    (orders / "step").write_text("attach:admitted")
    call = container.start_call("ADD", container.config("web"))
    eventually(lambda: not node.is_running, "the agent was not killed")
    node.start()
    return succeed(container.finish_call(call)).ips


def _expect_apart(one: Container, ips: dict[int, str]) -> None:
    for ip in ips.values():
        expect(not one.namespace.pings(ip, wait=1), f"{ip} answers, and must not")


def _received(container: Container) -> int:
    """How many packets came in on its interface."""
    text = container.namespace.run("ip", "-s", "-j", "link", "show", "eth0").stdout
    return int(json.loads(text)[0]["stats64"]["rx"]["packets"])


def _serves(container: Container) -> bool:
    return container.namespace.run("ss", "-Hltn", "sport = :8080").stdout.strip() != ""


def _links(node: LabNode) -> list[str]:
    links = node.namespace.run("ip", "-o", "link").stdout.splitlines()
    return [line.split(":")[1].strip() for line in links if ": mrg" in line]


if __name__ == "__main__":
    sys.exit(main())
