"""Bad input gets a clear error, and nothing is lost or left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moorage.lab import Container, LabNode
from moorage.lab.container import HOOK, PATH
from tests.system.conftest import assert_nothing_left, eventually, links

pytestmark = pytest.mark.kernel


def refused(container: Container, network: str = "web", **asked: object) -> tuple[int, str]:
    answer = container.add(network, **asked)
    assert answer.exit != 0
    return answer.json["code"], answer.json["msg"]


def test_an_unknown_network_is_answered_with_the_known_ones(node: LabNode) -> None:
    with node.container() as container:
        code, message = refused(container, "wbe")
        assert code == 7
        assert "'wbe'" in message
        assert "web" in message


def test_a_missing_namespace_is_named_and_not_created(node: LabNode) -> None:
    container = node.container()
    code, message = refused(container)
    assert code == 3
    assert str(container.namespace.path) in message
    assert not container.namespace.path.exists()
    assert_nothing_left(node)


@pytest.mark.parametrize("path", ["/proc/self/ns/mnt", "/proc/self/ns/uts", "/etc/hostname"])
def test_what_is_no_network_namespace_is_refused(node: LabNode, path: str) -> None:
    container = node.container()
    container.namespace.path = Path(path.replace("self", str(node.pid)))
    code, message = refused(container)
    assert code == 8
    assert "network namespace" in message


def test_the_nodes_own_namespace_is_refused(node: LabNode) -> None:
    container = node.container()
    container.namespace.path = node.namespace.path
    code, message = refused(container)
    assert code == 8
    assert "own" in message
    assert links(node) == []


def test_a_static_address_that_is_taken_names_its_holder(node: LabNode) -> None:
    with node.container() as first, node.container() as second:
        first.add("web", labels={"moorage.ip": "10.64.0.9"})
        code, message = refused(second, labels={"moorage.ip": "10.64.0.9"})
        assert code == 101
        assert first.id in message
        assert node.name in message
        first.delete("web")
    assert_nothing_left(node)


def test_a_static_address_outside_the_pools_names_them(node: LabNode) -> None:
    with node.container() as container:
        code, message = refused(container, labels={"moorage.ip": "192.0.2.1"})
        assert code == 7
        assert "10.64.0.0/16" in message


def test_an_exhausted_pool_says_who_holds_what(node: LabNode) -> None:
    node.cli("network", "create", "tiny", "--pool", "10.66.0.0/30", "--warm", "0")
    with node.container() as one, node.container() as two, node.container() as three:
        one.add("tiny")
        two.add("tiny")
        code, message = refused(three, "tiny")
        assert code == 11
        assert "2 assigned" in message
        assert node.name in message


def test_a_second_add_for_a_live_endpoint_is_refused(node: LabNode) -> None:
    with node.container() as container:
        ips = container.add("web").ips
        code, message = refused(container)
        assert code == 102
        assert ips[4] in message
        assert node.namespace.pings(ips[4])


def test_an_interface_that_somebody_else_made_is_left_alone(node: LabNode) -> None:
    with node.container() as container:
        container.namespace.run("ip", "link", "add", "eth0", "type", "bridge")
        code, message = refused(container)
        assert code == 105
        assert "eth0" in message
        assert "bridge" in container.namespace.run("ip", "-d", "link", "show", "eth0").stdout
        assert_nothing_left(node)


@pytest.mark.parametrize("missing", ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"])
def test_a_missing_variable_is_named(node: LabNode, missing: str) -> None:
    environment = {**node.container().environment("ADD", "eth0"), "MOORAGE_SOCKET": str(node.socket)}
    del environment[missing]
    result = subprocess.run([HOOK], env=environment, input=b"{}", capture_output=True)
    assert result.returncode != 0
    assert missing.encode() in result.stdout


@pytest.mark.parametrize(
    "stdin",
    [b"", b"{", b"[1]", b"nonsense", b'{"a":' * 100_000, b'{"name":"web","x":"' + b"x" * (1 << 20) + b'"}'],
    ids=["empty", "cut", "array", "text", "deep", "oversized"],
)
def test_malformed_stdin_is_a_decoding_error_and_del_still_works(node: LabNode, stdin: bytes) -> None:
    container = node.container()
    for command, expected in (("ADD", 6), ("DEL", None)):
        environment = {
            **container.environment(command, "eth0"),
            "MOORAGE_SOCKET": str(node.socket),
            "PATH": PATH,
        }
        result = subprocess.run([HOOK], env=environment, input=stdin, capture_output=True)
        if expected is None:
            assert (result.returncode, result.stdout) == (0, b"")
        else:
            assert f'"code":{expected}'.encode() in result.stdout.replace(b" ", b"")


def test_an_unknown_label_of_ours_is_refused_with_the_known_ones(node: LabNode) -> None:
    with node.container() as container:
        code, message = refused(container, labels={"moorage.ipp": "10.64.0.9"})
        assert code == 7
        assert "moorage.ip" in message


def test_two_agents_in_one_namespace_are_refused(node: LabNode) -> None:
    from moorage.lab.node import MOORAGE

    second = node.namespace.run(
        *MOORAGE, "agent", "--node", "second", "--store", node.store,
        "--state-dir", f"{node.directory}/second", "--socket", f"{node.directory}/second.sock",
        check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert "another moorage agent" in second.stderr
    eventually(node.answers)
