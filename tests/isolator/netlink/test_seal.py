"""What an alias says counts where it was said here, of that very pair."""

from __future__ import annotations

from pathlib import Path

import pytest

from isolator.alias_key import NAME, alias_key
from isolator.netlink.seal import MOST_SAID, Ends, Seal

ENDS = Ends(1 << 29, 1 << 30, 3)
SEAL = Seal(b"k" * 32)
NAME_OF_IT = "mrg" + "a" * 12


@pytest.mark.parametrize("said", ["", '{"a":["c 1","eth0"]}', "x" * MOST_SAID])
def test_what_was_said_here_is_read_again_and_fits(said: str) -> None:
    alias = SEAL.write(ENDS, NAME_OF_IT, said)
    assert len(alias.encode()) <= 255
    assert SEAL.read(ENDS, alias) == (NAME_OF_IT, said)


@pytest.mark.parametrize(
    "ends", [ENDS._replace(here=5), ENDS._replace(peer=5), ENDS._replace(peer_namespace=4), Ends(1, 1, None)]
)
def test_a_copy_on_another_pair_says_nothing(ends: Ends) -> None:
    assert SEAL.read(ends, SEAL.write(ENDS, NAME_OF_IT, "{}")) == ("", "")


def test_what_was_changed_or_sealed_with_another_key_says_nothing() -> None:
    alias = SEAL.write(ENDS, NAME_OF_IT, '{"n":["web"]}')
    for changed in (
        alias.replace("web", "db"),
        alias.replace("mrga", "mrgb"),
        Seal(b"other").write(ENDS, NAME_OF_IT, '{"n":["web"]}'),
        f'moorage {NAME_OF_IT} {{"n":["web"]}}',
        f"moorage {NAME_OF_IT}",
        "moorage é é é",
        "",
    ):
        assert SEAL.read(ENDS, changed) == ("", "")


def test_the_key_is_made_once_and_anew_where_it_is_damaged(tmp_path: Path) -> None:
    first = alias_key(tmp_path / "state")
    file = tmp_path / "state" / NAME
    assert (alias_key(tmp_path / "state"), file.stat().st_mode & 0o777) == (first, 0o600)
    file.write_bytes(first[:5])
    assert alias_key(tmp_path / "state") not in (first, first[:5])


def test_an_agent_starts_where_its_key_can_be_neither_read_nor_kept(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert len(alias_key(tmp_path)) == 32
