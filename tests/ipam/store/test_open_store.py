"""Which store a URL opens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipam.errors import InvalidInput, NotFound
from ipam.store import open_store, sqlite_path


async def test_a_sqlite_url_makes_its_file(tmp_path: Path) -> None:
    store = await open_store(f"sqlite://{tmp_path}/new/store.db")
    await store.close()
    assert (tmp_path / "new" / "store.db").is_file()


async def test_who_only_wants_to_read_makes_no_store(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/new/store.db"
    with pytest.raises(NotFound, match="there is no store at"):
        await open_store(url, create=False)
    assert os.listdir(tmp_path) == []
    await (await open_store(url)).close()
    await (await open_store(url, create=False)).close()


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///var/lib/moorage/store.db", "/var/lib/moorage/store.db"),
        ("sqlite:///srv/my%20store.db", "/srv/my store.db"),
        ("sqlite:///srv/100%25.db", "/srv/100%.db"),
    ],
)
def test_a_path_may_be_percent_encoded(url: str, path: str) -> None:
    assert sqlite_path(url) == Path(path)


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "q?mode=ro.db", "h#.db", "ü.db", "-wal"])
async def test_odd_file_names_work(tmp_path: Path, name: str) -> None:
    encoded = "".join(c if c.isalnum() else "".join(f"%{b:02x}" for b in c.encode()) for c in name)
    store = await open_store(f"sqlite://{tmp_path}/{encoded}")
    await store.close()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/var/lib/moorage/store.db",
        "redis://localhost",
        "sqlite",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///var/lib/",
        "sqlite://store.db",
        "sqlite:store.db",
        "sqlite:///store.db?mode=ro",
        "sqlite:///store.db#x",
        "sqlite:///store%00.db",
        "sqlite://[::1/store.db",
    ],
)
async def test_a_url_that_names_no_store_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"sqlite:///|zero byte"):
        await open_store(url)
