"""The node's name: chosen once, whatever the host is called later."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import isolator.identity as identity_module
from ipam.errors import InvalidInput
from ipam.journal import AddressRow
from ipam.records import Address, AddressState
from isolator.identity import machine_id
from isolator.journal import Journal
from isolator.node_name import settle

STATE_DIR = Path("/var/lib/moorage")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.db", "boot")
    yield journal
    journal.close()


def of_an_earlier_version(journal: Journal, *nodes: str) -> None:
    """It has addresses, of these nodes, and no name."""
    journal.save_addresses(
        AddressRow(
            ip_address("10.0.0.1") + number, Address(pool="p", state=AddressState.WARM, node=node), 1, False
        )
        for number, node in enumerate(nodes)
    )


@pytest.mark.parametrize("given", [True, False])
def test_the_first_start_chooses_the_name(journal: Journal, given: bool) -> None:
    assert settle(journal, "n1", given=given, state_dir=STATE_DIR) == "n1"
    assert journal.node == "n1"


def test_a_host_that_is_renamed_stays_the_node_that_it_was(journal: Journal) -> None:
    settle(journal, "n1", given=False, state_dir=STATE_DIR)
    with capture_logs() as logs:
        assert settle(journal, "n1.example.org", given=False, state_dir=STATE_DIR) == "n1"
    assert [(entry["node"], entry["host"]) for entry in logs] == [("n1", "n1.example.org")]


BAD_HOST_NAMES = ["web_1", "x" * 64, "-box", "(none)", "", "localhost", "localhost.localdomain"]


@pytest.mark.parametrize("host", BAD_HOST_NAMES)
def test_a_node_that_has_its_name_keeps_it_whatever_the_host_is_called(journal: Journal, host: str) -> None:
    settle(journal, "n1", given=False, state_dir=STATE_DIR)
    assert settle(journal, host, given=False, state_dir=STATE_DIR) == "n1"


@pytest.mark.parametrize("host", BAD_HOST_NAMES)
def test_a_new_node_takes_no_name_that_says_nothing_from_its_host(journal: Journal, host: str) -> None:
    with pytest.raises(InvalidInput, match="name the node with --node"):
        settle(journal, host, given=False, state_dir=STATE_DIR)
    assert journal.node == ""
    assert settle(journal, "localhost", given=True, state_dir=STATE_DIR) == "localhost"


def test_another_chosen_name_is_refused_with_both_and_the_way_out(journal: Journal) -> None:
    settle(journal, "n1", given=False, state_dir=STATE_DIR)
    with pytest.raises(InvalidInput) as refused:
        settle(journal, "n2", given=True, state_dir=STATE_DIR)
    said = str(refused.value)
    for part in (
        "node n1's",
        "to be node n2",
        "start it as n1",
        "node drain n1",
        "node remove n1",
        f"--state-dir {STATE_DIR}/n2",
    ):
        assert part in said
    assert journal.node == "n1"


def test_a_journal_of_an_earlier_version_is_that_of_its_addresses_node(journal: Journal) -> None:
    of_an_earlier_version(journal, "n1", "n1")
    with pytest.raises(InvalidInput, match="is node n1's"):
        settle(journal, "n2", given=True, state_dir=STATE_DIR)
    assert settle(journal, "n2", given=False, state_dir=STATE_DIR) == "n1"


def test_of_the_names_that_an_earlier_version_had_one_that_is_chosen_counts(journal: Journal) -> None:
    of_an_earlier_version(journal, "n1", "n2", "n2")
    assert settle(journal, "n1", given=True, state_dir=STATE_DIR) == "n1"


def test_of_the_names_that_an_earlier_version_had_that_of_most_addresses_counts(journal: Journal) -> None:
    of_an_earlier_version(journal, "n1", "n2", "n2")
    assert settle(journal, "n3", given=False, state_dir=STATE_DIR) == "n2"


def test_a_journal_has_an_id_of_its_own_for_good(tmp_path: Path) -> None:
    ids = []
    for name in ("a", "a", "b"):
        journal = Journal(tmp_path / name, "boot")
        ids.append(journal.state_id)
        journal.close()
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("text", [None, "", "uninitialized\n", "x" * 32])
def test_a_machine_without_an_id_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    file = tmp_path / "machine-id"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(identity_module, "_MACHINE_ID", file)
    assert machine_id() == ""


def test_a_machine_id_is_always_the_same_and_not_the_one_that_is_not_to_be_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "machine-id"
    file.write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    monkeypatch.setattr(identity_module, "_MACHINE_ID", file)
    assert len(machine_id()) == 32
    assert machine_id() == machine_id() != "3d1219c7c4c5404aaa1f6d2a48adfda4"
