"""Both stores, as the tests of IPAM have them."""

from tests.ipam.conftest import etcd_member, store_url

__all__ = ["etcd_member", "store_url"]
