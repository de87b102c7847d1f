"""The build of the package; the tools are configured in pyproject.toml."""

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "moorage/__init__.py").read_text("utf-8"), re.MULTILINE
)
PACKAGES = ["moorage", "netmodules", "marathon", "isolator", "ipam"]

PYTHON_HOOK = "bin/moorage-cni-py"
NATIVE = HERE / "netmodules/native"


class BuildScripts(Distribution().get_command_class("build_scripts")):
    """Makes ``moorage-cni`` too: the native hook, or without a C compiler the Python one under that name."""

    def run(self):
        super().run()
        target = Path(self.build_dir, "moorage-cni")
        compiler = shlex.split(os.environ.get("CC") or "cc")
        try:
            subprocess.run(
                [*compiler, f"@{NATIVE / 'flags'}", "-o", target, NATIVE / "moorage-cni.c"], check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"moorage-cni becomes the Python program, because it cannot be compiled: {error}")
            shutil.copyfile(HERE / PYTHON_HOOK, target)
        target.chmod(0o755)


class Wheel(bdist_wheel):
    """For any Python 3, and for this platform only if there is a native program in it."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        hook = Path(self.get_finalized_command("build_scripts").build_dir, "moorage-cni")
        if platform == "any" and hook.exists() and hook.read_bytes()[:2] != b"#!":
            platform = re.sub(r"[-. ]", "_", sysconfig.get_platform())
        return python, abi, platform


setup(
    name="moorage",
    version=VERSION[1],
    description="An IP address for every Mesos container, isolated by netgroup, never lost or double-booked",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    # The hook is no entry point: those take 30 ms to start. docs/decisions/native-hook.md
    scripts=[PYTHON_HOOK, "bin/moorage-netmodules"],
    cmdclass={"build_scripts": BuildScripts, "bdist_wheel": Wheel},
    entry_points={"console_scripts": ["moorage = moorage.cli:main"]},
    # Why each of them: docs/decisions/dependencies.md. Exact versions for CI: constraints.txt.
    install_requires=[
        "click>=8.1,<9",
        "grpcio>=1.60,<2",
        "msgspec>=0.19,<1",
        "pip-nftables>=1.0.2.post1,<2",
        "protobuf>=4.25,<8",
        "requests>=2.31,<3",
        "rich>=13.7,<16",
        "structlog>=24.1,<27",
        "tenacity>=9,<10",
        "urllib3>=2.1,<3",
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
            "scapy>=2.6,<3",
            "types-requests>=2.31,<3",
        ],
    },
    zip_safe=False,
)
