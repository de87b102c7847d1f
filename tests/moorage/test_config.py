"""The layers of the configuration, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipam.errors import InvalidInput
from moorage import config


@pytest.fixture(autouse=True)
def no_file_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "absent.toml")


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return path


def refusal(
    flags: dict[str, str | None] | None = None,
    environ: dict[str, str] | None = None,
    file: Path | None = None,
) -> str:
    with pytest.raises(InvalidInput) as caught:
        config.load(flags, environ or {}, file)
    return str(caught.value)


def test_without_anything_there_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Host7.example.org")
    assert config.load({}, {}) == config.AgentConfig(
        node="host7.example.org",
        node_given=False,
        store="sqlite:///var/lib/moorage/store.db",
        state_dir=Path("/var/lib/moorage"),
        socket=Path("/run/moorage/agent.sock"),
        log_level="info",
        log_format="console",
        underlay=None,
        vxlan_port=4789,
        gateway=False,
        manage_docker_user=True,
        default_network=None,
        mesos_agent_url=None,
        mesos_credentials=None,
        mesos_ca=None,
    )


SAMPLES = {
    "node": ("from-file", "from-env", "from-flag"),
    "store": ("sqlite:///a.db", "sqlite:///b.db", "etcd://10.0.0.1:2379,10.0.0.2:2379?ca=/etc/ca.pem"),
    "state_dir": ("/a", "/b", "/c"),
    "socket": ("/a/s", "/b/s", "/c/s"),
    "log_level": ("error", "warning", "debug"),
    "log_format": ("json", "console", "json"),
    "underlay": ("eth0", "192.0.2.0/24", "2001:db8::1/128"),
    "vxlan_port": ("4790", "4791", "4792"),
    "gateway": ("true", "false", "true"),
    "manage_docker_user": ("false", "true", "false"),
    "default_network": ("web", "db-1", "net.prod"),
    "mesos_agent_url": ("http://192.0.2.1:5051", "https://mesos.example:5051", "http://[2001:db8::1]:5051"),
    "mesos_credentials": ("/a/c", "/b/c", "/c/c"),
    "mesos_ca": ("/a/ca", "/b/ca", "/c/ca"),
}


def test_every_setting_has_a_sample() -> None:
    assert SAMPLES.keys() == set(config.KEYS)


@pytest.mark.parametrize("key", config.KEYS)
def test_flags_win_over_environment_over_file_over_default(key: str, tmp_path: Path) -> None:
    in_file, in_environment, in_flag = SAMPLES[key]
    others = {"node": "n"} if key != "node" else {}
    file = written(tmp_path, f'{key} = "{in_file}"\n')
    environ = {"MOORAGE_" + key.upper(): in_environment, "PATH": "/bin"}

    def value(flags: dict[str, str | None], environ: dict[str, str], file: Path) -> str:
        found = getattr(config.load({**others, **flags}, environ, file), key)
        return str(found).lower() if isinstance(found, bool) else str(found)

    assert value({key: in_flag}, environ, file) == in_flag
    assert value({key: None}, environ, file) == in_environment
    assert value({}, {}, file) == in_file


@pytest.mark.parametrize("layer", ["flag", "environment", "file"])
def test_a_node_name_of_any_layer_is_a_chosen_one(layer: str, tmp_path: Path) -> None:
    file = written(tmp_path, 'node = "a"\n' if layer == "file" else "")
    flags: dict[str, str | None] = {"node": "a" if layer == "flag" else None}
    environ = {"MOORAGE_NODE": "a"} if layer == "environment" else {}
    assert config.load(flags, environ, file).node_given


def test_numbers_and_switches_may_be_written_as_toml_has_them(tmp_path: Path) -> None:
    loaded = config.load({"node": "n"}, {}, written(tmp_path, "vxlan_port = 8472\ngateway = true\n"))
    assert (loaded.vxlan_port, loaded.gateway) == (8472, True)


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    loaded = config.load({}, {"MOORAGE_UNDERLAY": "", "MOORAGE_NODE": "a", "MOORAGE_ODD": ""})
    assert (loaded.node, loaded.underlay) == ("a", None)


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, 'node = "a"\n')
    assert config.load({}, {"MOORAGE_CONFIG": str(file)}).node == "a"


def test_the_file_of_the_flag_wins_over_that_of_the_environment(tmp_path: Path) -> None:
    file = written(tmp_path, 'node = "a"\n')
    assert config.load({}, {"MOORAGE_CONFIG": "/nowhere.toml"}, file).node == "a"


def test_the_default_file_is_read_if_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", written(tmp_path, 'node = "a"\n'))
    assert config.load({}, {}).node == "a"


def test_an_unknown_key_is_refused_by_name_with_a_guess(tmp_path: Path) -> None:
    file = written(tmp_path, 'node = "a"\nstate-dir = "/x"\n')
    assert refusal(file=file) == (
        f"{file}: the key state-dir is unknown (did you mean state_dir?); correct it or remove it"
    )


def test_an_unknown_key_like_no_other_lists_the_known(tmp_path: Path) -> None:
    file = written(tmp_path, "[marathon]\nurl = 'http://m'\n")
    assert "the key marathon is unknown (known are node, store, state_dir, " in refusal(file=file)


def test_an_unknown_variable_is_refused_by_name_with_a_guess() -> None:
    assert refusal(environ={"MOORAGE_NOED": "a"}) == (
        "the environment variable MOORAGE_NOED is unknown (did you mean MOORAGE_NODE?); correct it or unset it"
    )


def test_a_missing_file_that_was_named_is_an_error() -> None:
    assert refusal(file=Path("/nowhere.toml")).startswith("/nowhere.toml: there is no such file")


def test_a_file_that_is_no_toml_is_named_with_the_line(tmp_path: Path) -> None:
    file = written(tmp_path, "node: a\n")
    assert refusal(file=file).startswith(f"{file}: not valid TOML: ")
    assert "line 1" in refusal(file=file)


def test_a_file_that_is_a_directory_is_named(tmp_path: Path) -> None:
    assert refusal(file=tmp_path).startswith(f"{tmp_path}: cannot be read: Is a directory")


@pytest.mark.parametrize("text", ["7", "true", "['a']"])
def test_a_value_of_another_type_is_refused(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, f"node = {text}\n")
    assert refusal(file=file).startswith(f"{file}: node: expected text in quotes, not ")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("node", "Node", "lower-case letters"),
        ("node", "a/b", "lower-case letters"),
        ("node", "-a", "lower-case letters"),
        ("node", "a-", "lower-case letters"),
        ("node", "a" * 64, "1 to 63"),
        ("node", "a\n", "1 to 63"),
        ("store", "/var/lib/store.db", "a store URL such as sqlite:///"),
        ("store", "etcd://root:secret@10.0.0.1:2379", "without user and password"),
        ("store", "http://[::1", "a store URL"),
        ("state_dir", "state", "an absolute path of a directory"),
        ("socket", "agent.sock", "an absolute path of at most 103 bytes"),
        ("socket", "/" + "a" * 103, "at most 103 bytes"),
        ("log_level", "loud", "one of debug, info, warning, error"),
        ("log_format", "xml", "one of console, json"),
        ("underlay", "an-interface-too-long", "an interface, such as eth0"),
        ("underlay", "eth 0", "an interface, such as eth0"),
    ],
)
def test_nonsense_is_refused_naming_place_and_expectation(key: str, text: str, expected: str) -> None:
    sentence = refusal({"node": "n", key: text})
    assert sentence.startswith(f"--{key.replace('_', '-')}: expected ")
    assert expected in sentence
    sentence = refusal({}, {"MOORAGE_NODE": "n", "MOORAGE_" + key.upper(): text})
    assert sentence.startswith(f"MOORAGE_{key.upper()}: expected ")


def test_the_longest_socket_and_node_are_accepted() -> None:
    loaded = config.load({"node": "a" * 63, "socket": "/" + "s" * 102}, {})
    assert (len(loaded.node), len(str(loaded.socket))) == (63, 103)


@pytest.mark.parametrize("host", ["my_host", "", "caf\udce9"])
def test_a_host_name_that_cannot_name_a_node_is_for_a_new_node_to_refuse(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: host)
    loaded = config.load({}, {})
    assert loaded.node.encode() == host.encode(errors="replace")
    assert not loaded.node_given
    assert refusal({"node": "my_host"}).startswith("--node: expected ")


def test_a_password_is_not_repeated_in_the_error() -> None:
    assert "secret" not in refusal({"node": "n", "store": "etcd://root:secret@10.0.0.1:2379"})
