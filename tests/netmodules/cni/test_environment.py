"""CNI_* variables: everything wrong is named, at once."""

import pytest

from isolator.model import EndpointKey
from netmodules.cni.environment import read_environment, read_key
from netmodules.cni.errors import BadEnvironment
from tests.netmodules.fakes import cni_env


def test_all_missing_variables_are_named() -> None:
    with pytest.raises(BadEnvironment) as caught:
        read_environment({}, netns_required=True)
    for name in ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS"):
        assert f"{name} is missing" in str(caught.value)


def test_missing_and_wrong_ones_are_named_together() -> None:
    env = cni_env("ADD", CNI_CONTAINERID="-x", CNI_IFNAME="a/b", CNI_NETNS=None, CNI_ARGS="novalue")
    with pytest.raises(BadEnvironment) as caught:
        read_environment(env, netns_required=True)
    for name in ("CNI_CONTAINERID '-x'", "CNI_IFNAME 'a/b'", "CNI_NETNS is missing", "CNI_ARGS"):
        assert name in str(caught.value)


def test_a_del_needs_its_key_only() -> None:
    env = cni_env("DEL", CNI_NETNS=None, CNI_ARGS="novalue", CNI_PATH=None)
    assert read_key(env) == EndpointKey("c0ffee", "eth0")


@pytest.mark.parametrize("good", ["a", "0", "A.b-c_d", "1f.2e.3d", "x" * 1280])
def test_container_ids_that_engines_use(good: str) -> None:
    assert read_key(cni_env("DEL", CNI_CONTAINERID=good)).container_id == good


@pytest.mark.parametrize("bad", [".a", "a/b", "a b", "a\n", "ä", "x" * 1281, "\udcff"])
def test_container_ids_that_no_engine_may_use(bad: str) -> None:
    with pytest.raises(BadEnvironment, match="CNI_CONTAINERID"):
        read_key(cni_env("DEL", CNI_CONTAINERID=bad))


@pytest.mark.parametrize("bad", [".", "..", "a/b", "a:b", "a b", "a\t", "x" * 16, "ä"])
def test_interface_names_that_the_kernel_refuses(bad: str) -> None:
    with pytest.raises(BadEnvironment, match="CNI_IFNAME"):
        read_key(cni_env("DEL", CNI_IFNAME=bad))


@pytest.mark.parametrize("bad", ["relative", "/x\ny", "/\udcff", "/" + "x" * 4095])
def test_namespaces_that_cannot_be_paths(bad: str) -> None:
    with pytest.raises(BadEnvironment, match="CNI_NETNS"):
        read_environment(cni_env("ADD", CNI_NETNS=bad), netns_required=True)


def test_cni_args_are_taken_apart() -> None:
    env = cni_env("ADD", CNI_ARGS="IgnoreUnknown=1;IP=10.0.0.5;MAC=;X=a=b;")
    assert read_environment(env, netns_required=True).args == {
        "IgnoreUnknown": "1",
        "IP": "10.0.0.5",
        "MAC": "",
        "X": "a=b",
    }
