"""Both stores, as the tests of IPAM have them, and the embedded one alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ipam.store import Store, open_store
from tests.ipam.conftest import etcd_member, store_url

__all__ = ["etcd_member", "store_url"]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store(f"sqlite://{tmp_path}/store.db")
    yield store
    await store.close()
