"""The build of the package; the tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "moorage/__init__.py").read_text("utf-8"), re.MULTILINE
)
PACKAGES = ["moorage", "netmodules", "marathon", "isolator", "ipam"]

setup(
    name="moorage",
    version=VERSION[1],
    description="An IP address for every Mesos container, isolated by netgroup, never lost or double-booked",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    # The hook is plain files: it starts in milliseconds, which a generated entry point would not.
    scripts=["bin/moorage-cni"],
    entry_points={"console_scripts": ["moorage = moorage.cli:main"]},
    # Why each of them: docs/decisions/dependencies.md. Exact versions for CI: constraints.txt.
    install_requires=[
        "click>=8.1,<9",
        "grpcio>=1.60,<2",
        "msgspec>=0.19,<1",
        "pip-nftables>=1.0.2.post1,<2",
        "protobuf>=4.25,<8",
        "rich>=13.7,<16",
        "structlog>=24.1,<27",
        "tenacity>=9,<10",
    ],
    extras_require={
        "test": [
            "hypothesis>=6.100,<7",
            "mypy>=1.15,<3",
            "pyroute2>=0.9.1,<0.10",
            "pytest>=8.3,<10",
            "pytest-asyncio>=1,<2",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<0.18",
        ],
    },
    zip_safe=False,
)
