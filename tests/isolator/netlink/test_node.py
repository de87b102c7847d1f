"""Opening and entering namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from isolator.errors import KernelRefused, NamespaceGone, NotANamespace
from isolator.netlink import Node
from tests.isolator.rooms import Room

pytestmark = pytest.mark.kernel


def current() -> tuple[int, int]:
    """The namespace the calling thread is in."""
    status = os.stat("/proc/thread-self/ns/net")
    return status.st_dev, status.st_ino


def test_entering_changes_this_thread_only_and_ends_where_it_began(container: Room) -> None:
    home, inside = current(), container.do(current)
    with Node() as node, node.open_namespace(container.path) as namespace:
        with namespace.inside():
            assert current() == inside
            elsewhere: list[tuple[int, int]] = []
            thread = threading.Thread(target=lambda: elsewhere.append(os.stat("/proc/self/ns/net")[1:3]))
            thread.start()
            thread.join()
        assert current() == home
        with pytest.raises(ZeroDivisionError), namespace.inside():
            _ = 1 / 0
        assert current() == home


def test_a_missing_path_is_gone_and_stays_missing(tmp_path: Path) -> None:
    with Node() as node:
        for path in (tmp_path / "nothing", tmp_path / "no" / "directory", Path("/proc/self/stat/ns/net")):
            with pytest.raises(NamespaceGone, match="does not exist"):
                node.open_namespace(str(path))
            assert not path.exists()


@pytest.mark.parametrize("kind", ["mnt", "uts", "ipc", "user"])
def test_namespaces_of_other_kinds_are_refused(kind: str) -> None:
    with Node() as node, pytest.raises(NotANamespace, match="not a network namespace"):
        node.open_namespace(f"/proc/self/ns/{kind}")


def test_files_directories_and_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    with Node() as node:
        for path in (tmp_path, tmp_path / "file", tmp_path / "pipe", Path("/dev/null")):
            with pytest.raises(NotANamespace, match="not a network namespace"):
                node.open_namespace(str(path))


def test_the_nodes_own_namespace_is_refused_by_any_path() -> None:
    with Node() as node:
        for path in ("/proc/self/ns/net", f"/proc/{os.getpid()}/ns/net", "/proc/thread-self/ns/net"):
            with pytest.raises(NotANamespace, match="node's own"):
                node.open_namespace(path)


def test_a_node_in_a_namespace_may_open_any_but_that_one(container: Room) -> None:
    with container.do(Node) as node:
        with pytest.raises(NotANamespace, match="node's own"):
            node.open_namespace(container.path)
        with node.open_namespace(f"/proc/{os.getpid()}/ns/net"):
            pass


def test_dead_processes_have_no_namespace() -> None:
    process = subprocess.Popen(["sleep", "60"])
    path = f"/proc/{process.pid}/ns/net"
    with Node() as node:
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NamespaceGone):  # a zombie
            node.open_namespace(path)
        process.wait()
        with pytest.raises(NamespaceGone):
            node.open_namespace(path)


def test_a_path_that_loops_is_an_error_of_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with Node() as node, pytest.raises(KernelRefused, match="could not open"):
        node.open_namespace(str(tmp_path / "loop"))


def test_no_descriptor_is_left_open(container: Room, tmp_path: Path) -> None:
    with Node() as node:
        before = os.listdir("/proc/self/fd")
        for path in (container.path, "/proc/self/ns/uts", str(tmp_path / "nothing")):
            try:
                with node.open_namespace(path) as namespace, namespace.inside():
                    pass
            except (NotANamespace, NamespaceGone):
                continue
        assert os.listdir("/proc/self/fd") == before


def test_a_thread_that_cannot_come_back_ends_the_process(container: Room) -> None:
    program = (
        "import os, resource\n"
        "from isolator.netlink import Node\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "node = Node()\n"
        f"with node.open_namespace({container.path!r}) as namespace, namespace.inside():\n"
        "    os.close(node._fd)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], check=False, text=True, stderr=subprocess.PIPE)
    assert ended.returncode == -signal.SIGABRT
    assert "cannot go on" in ended.stderr
