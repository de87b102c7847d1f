"""Certificates made on the spot, and replaced as their operators do."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.patience import PATIENCE


class Authority:
    """A certificate authority in a directory."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.ca = directory / f"{name}.pem"
        self._openssl("req", "-x509", *self._new(name), "-out", self.ca)

    def issue(self, name: str, usage: str, names: str, days: float = 2) -> tuple[Path, Path]:
        """Certificate and key for ``names`` (as openssl writes them), for serverAuth or clientAuth."""
        request, cert = self.directory / f"{name}.csr", self.directory / f"{name}.pem"
        extensions = self.directory / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage={usage}\n")
        self._openssl("req", *self._new(name), "-out", request)
        signer = ("-CA", self.ca, "-CAkey", self.directory / f"{self.name}.key", "-CAcreateserial")
        self._openssl(
            "x509", "-req", "-in", request, *signer, "-extfile", extensions, "-days", days, "-out", cert
        )
        return cert, self.directory / f"{name}.key"

    def _new(self, name: str) -> tuple[object, ...]:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        return (*key, "-keyout", self.directory / f"{name}.key", "-subj", f"/CN={name}")

    def _openssl(self, *arguments: object) -> None:
        done = subprocess.run(
            ["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr


class Rotated:
    """What both sides of mutual TLS have on their disks, all of which can be replaced. names: the servers', as openssl
    writes them."""

    def __init__(self, directory: Path, names: str = "IP:127.0.0.1") -> None:
        self._directory = directory
        self._names = names
        self._count = 0
        self.ca, self.cert, self.key = (directory / name for name in ("ca", "cert", "key"))
        self.trusted, self.server_cert, self.server_key = (
            directory / name for name in ("trusted", "server-cert", "server-key")
        )
        self.authority = self._new_authority()
        self.replace(self.authority)

    def _new_authority(self) -> Authority:
        self._count += 1
        folder = self._directory / f"authority-{self._count}"
        folder.mkdir()
        return Authority(folder, "ca")

    def replace(self, *trusted: Authority, clients: bool = True, servers: bool = True) -> None:
        """The last of these issues new certificates, and all are trusted."""
        issuer = trusted[-1]
        bundle = b"".join(authority.ca.read_bytes() for authority in trusted)
        if clients:
            cert, key = issuer.issue(f"client-{self._count}", "clientAuth", "DNS:client")
            self._put((self.ca, bundle), (self.cert, cert.read_bytes()), (self.key, key.read_bytes()))
        if servers:
            cert, key = issuer.issue(f"server-{self._count}", "serverAuth,clientAuth", self._names)
            self._put(
                (self.trusted, bundle),
                (self.server_cert, cert.read_bytes()),
                (self.server_key, key.read_bytes()),
            )

    @staticmethod
    def _put(*files: tuple[Path, bytes]) -> None:
        for path, content in files:
            path.write_bytes(content)

    def rotate(self) -> tuple[Authority, Authority]:
        """The authority until now, and its successor."""
        old, self.authority = self.authority, self._new_authority()
        return old, self.authority
