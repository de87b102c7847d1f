"""What others on the node reach of the agent: the table of docs/isolation.md, row by row."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorage.lab import Container, LabNode
from tests.system.conftest import eventually

pytestmark = pytest.mark.kernel


def table(name: str) -> str:
    """Asks nf_tables for it, in words of its own: a container has no nft."""
    return f"""
        import socket, struct
        link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        name = b"{name}\\0"
        body = struct.pack(">BBH", 1, 0, 0) + struct.pack("=HH", 4 + len(name), 1) + name + bytes(-len(name) % 4)
        link.send(struct.pack("=IHHII", 16 + len(body), 10 << 8 | 1, 1, 1, 0) + body)
        kind, number = struct.unpack_from("=4xH10xi", link.recv(4096))
        if kind == 2: raise OSError(-number, "")
    """


ATTEMPTS = {
    "agent.sock": """
        import socket
        socket.socket(socket.AF_UNIX).connect(f"{directory}/run/agent.sock")
    """,
    "spool": 'import os; os.listdir(f"{directory}/run/spool")',
    "journal.db": 'open(f"{directory}/state/journal.db").read(1)',
    "store.db": 'open(f"{directory}/store.db").read(1)',
    "abstract names": """
        found = [line for line in open("/proc/net/unix") if "@" in line and "moorage" in line]
        if not found: raise FileNotFoundError
    """,
    "ports": """
        # State 0A listens, 07 is bound without a connection; a header's fourth word is none.
        files = [open(f"/proc/net/{name}") for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6")]
        if not [line for file in files for line in file if line.split()[3] in ("0A", "07")]:
            raise ConnectionRefusedError
    """,
    "inet moorage-agent": table("moorage-agent"),
    "inet moorage": table("moorage"),
    "links, routes": """
        if "mrg" not in open("/proc/net/dev").read(): raise FileNotFoundError
    """,
    "/proc/PID/environ": 'open(f"/proc/{pid}/environ").read(1)',
    "/proc/PID/cmdline": """
        if b"moorage" not in open(f"/proc/{pid}/cmdline", "rb").read(): raise FileNotFoundError
    """,
}
"""Each raises unless it reaches something."""

SAID = {
    "PermissionError": "refused",
    "FileNotFoundError": "not there",
    "ConnectionRefusedError": "not there",
}


def attempt(code: str, node: LabNode) -> str:
    """As the table has it."""
    return (
        "import sys\n"
        f"directory, pid = {str(node.directory)!r}, {node.pid}\n"
        "try:\n"
        f"{textwrap.indent(textwrap.dedent(code), '    ')}\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "else:\n"
        "    print('reached')\n"
    )


def told(shown: subprocess.CompletedProcess[str]) -> str:
    word = (shown.stdout.split() or [shown.stderr])[0]
    return SAID.get(word, word)


def by_nobody(node: LabNode, code: str) -> str:
    """A process of the node, of a user without any right."""
    become = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--")
    return told(node.namespace.run(*become, "/usr/bin/python3", "-c", attempt(code, node)))


def by_root_inside(node: LabNode, container: Container, code: str) -> str:
    """Root of a container: network, PID and mount namespace of its own, other files; no user namespace."""
    inside = 'mount -t tmpfs none /tmp && exec "$@"'
    unshare = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", inside, "sh")
    return told(container.namespace.run(*unshare, "/usr/bin/python3", "-c", attempt(code, node)))


@pytest.fixture(scope="module")
def scene() -> Iterator[tuple[LabNode, Container]]:
    with LabNode("node") as node, node.container() as container:
        node.start()
        node.cli("network", "create", "web", "--pool", "10.64.0.0/16")
        eventually(lambda: container.add("web").exit == 0)
        yield node, container


def table() -> dict[str, tuple[str, str]]:
    """What the page says: row -> what a process without rights gets, what root of a container gets."""
    page = Path(__file__).parents[2].joinpath("docs", "isolation.md").read_text("utf-8")
    part = page.partition("## What others on the node reach")[2].partition("\n## ")[0]
    rows = re.findall(
        r"^\| `([^`]+)`[^|]*\| (\w[^|(]*?) *(?:\([^|]*)?\| (\w[^|(]*?) *(?:\([^|]*)?\|", part, re.MULTILINE
    )
    return {name: (nobody, root) for name, nobody, root in rows}


def test_every_row_is_tried() -> None:
    assert table().keys() == ATTEMPTS.keys()


@pytest.mark.parametrize("row", ATTEMPTS)
def test_what_others_on_the_node_reach_is_what_the_page_says(
    scene: tuple[LabNode, Container], row: str
) -> None:
    node, container = scene
    assert (by_nobody(node, ATTEMPTS[row]), by_root_inside(node, container, ATTEMPTS[row])) == table()[row]


def test_a_process_without_rights_does_not_keep_the_agent_from_starting(
    scene: tuple[LabNode, Container],
) -> None:
    """It holds the name by which agents of earlier versions claimed their namespace."""
    node, _ = scene
    node.stop()
    hold = (
        "import os, socket\nos.setuid(65534)\n"
        "held = socket.socket(socket.AF_UNIX); held.bind('\\0moorage-agent'); held.listen()\nprint(flush=True)\ninput()"
    )
    with node.namespace.start(
        sys.executable, "-c", hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        node.start()
        process.kill()


def test_a_second_agent_in_the_nodes_network_says_whose_pid_is_in_the_way(
    scene: tuple[LabNode, Container],
) -> None:
    node, _ = scene
    second = LabNode("second", namespace=node.namespace)  # its own files, the same network
    second.directory.mkdir(mode=0o700)
    try:
        second.launch()
        eventually(lambda: not second.is_running)
        assert f"(pid {node.pid})" in second.log.read_text()
    finally:
        second.kill()
        shutil.rmtree(second.directory)
