"""Stand-ins that the tests of netmodules share: a fake isolator, requests, the hook as a process."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ipam.errors import NotFound
from isolator.errors import NotAttached
from isolator.model import Asked, AttachSpec, Endpoint, EndpointKey, EndpointState, ValidAttachments
from netmodules.cni.handler import CniHandler
from netmodules.request import Reply, Request

CHECKOUT = Path(__file__).parents[2]
SCRIPT = CHECKOUT / "bin" / "moorage-cni-py"
NATIVE = CHECKOUT / "netmodules" / "native"
ASKED = Asked(boot_id="11111111-2222-3333-4444-555555555555", at=1_000_000_000)
MAC = "02:6d:0a:00:00:01"

_ids = itertools.count(1)


class FakeIsolator:
    """Attaches by remembering; ``failure`` is raised instead, by whichever method is called next."""

    def __init__(self, networks: Mapping[str, list[str]] | None = None) -> None:
        self.networks = dict(networks or {"web": ["10.1.0.0/24"], "dual": ["10.2.0.0/24", "fd00::/64"]})
        self.specs: list[AttachSpec] = []
        self.detached: list[tuple[EndpointKey, Asked]] = []
        self.collected: list[ValidAttachments] = []
        self.live: dict[EndpointKey, Endpoint] = {}
        self.failure: Exception | None = None
        self._hosts = itertools.count(10)

    async def attach(self, spec: AttachSpec) -> Endpoint:
        self._fail()
        if spec.network not in self.networks:
            raise NotFound(f"network {spec.network} does not exist")
        self.specs.append(spec)
        ips = {ip.version: ip for ip in spec.ips}
        for pool in self.networks[spec.network]:
            ip = ip_address(int(ip_address(pool.partition("/")[0])) + next(self._hosts))
            ips.setdefault(ip.version, ip)
        endpoint = Endpoint(
            key=spec.key,
            state=EndpointState.ATTACHED,
            request_id=spec.request_id,
            asked=spec.asked,
            engine=spec.engine,
            network=spec.network,
            driver="routed",
            netns=spec.netns,
            ips=tuple(ips[version] for version in sorted(ips)),
            host_ifname="mrg0123456789",
            mac=spec.mac or MAC,
            mtu=spec.mtu or 1450,
            netgroups=spec.netgroups,
            labels=spec.labels,
            nameservers=("10.9.9.9",),
            search=("net.internal",),
            engine_network=spec.engine_network,
        )
        self.live[spec.key] = endpoint
        return endpoint

    async def detach(self, key: EndpointKey, asked: Asked) -> None:
        self._fail()
        self.detached.append((key, asked))
        self.live.pop(key, None)

    async def check(self, key: EndpointKey, netns: str) -> Endpoint:
        self._fail()
        if key not in self.live:
            raise NotAttached(f"{key} is not attached")
        return self.live[key]

    async def ready(self, network: str | None) -> None:
        self._fail()
        if network is not None and network not in self.networks:
            raise NotFound(f"network {network} does not exist")

    async def collect_garbage(self, valid: ValidAttachments) -> None:
        self._fail()
        self.collected.append(valid)

    def known_networks(self) -> list[str]:
        return list(self.networks)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


def handler_for(isolator: FakeIsolator, **options: Any) -> CniHandler:
    """The real handler on the fake."""
    return CniHandler(isolator, **options)


def cni_env(command: str, **changes: str | None) -> dict[str, str]:
    """The variables that Mesos passes; a change to None leaves one out."""
    env: dict[str, str | None] = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c0ffee",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": "/run/netns/c0ffee",
        "CNI_PATH": "/opt/cni/bin",
        **changes,
    }
    return {name: value for name, value in env.items() if value is not None}


def cni_request(command: str, config: Any = None, env: Mapping[str, str] | None = None) -> Request:
    """A request as the server would hand it over; ``config`` is bytes, or a value that becomes JSON."""
    stdin = config if isinstance(config, bytes) else json.dumps(config or {"name": "web"}).encode()
    return Request("cni", f"{next(_ids):032x}", ASKED, dict(env or cni_env(command)), stdin)


def mesos_config(network_info: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A configuration as the Mesos agent sends it."""
    return {"name": "web", "args": {"org.apache.mesos": {"network_info": dict(network_info)}}, **fields}


def labels_config(*labels: tuple[str, str | None], **fields: Any) -> dict[str, Any]:
    """A Mesos configuration with these labels."""
    listed = [{"key": key, "value": value} for key, value in labels]
    return mesos_config({"name": "web", "labels": {"labels": listed}}, **fields)


def body(reply: Reply) -> dict[str, Any]:
    """The JSON on stdout."""
    parsed: dict[str, Any] = json.loads(reply.stdout)
    return parsed


def assert_cni_error(reply: Reply, code: int, *words: str) -> None:
    """A valid CNI error with this code, whose message has these words."""
    error = body(reply)
    assert reply.exit == 1
    assert error["code"] == code, error
    assert set(error) <= {"cniVersion", "code", "msg", "details"}
    assert "Traceback" not in error["msg"]
    for word in words:
        assert word in error["msg"]


async def run_hook(
    env: Mapping[str, str], stdin: bytes = b'{"name":"web"}', *, program: Path | None = None
) -> tuple[int, bytes]:
    """The real hook, as a process with this environment only; its exit code and stdout."""
    command = [program] if program else [sys.executable, "-IS", SCRIPT]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **env},
    )
    stdout, _ = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, stdout
