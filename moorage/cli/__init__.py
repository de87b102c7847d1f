"""The command line: ``moorage``. One file a group of commands; app.py is the root, output.py prints."""

from moorage.cli.app import cli, main

__all__ = ["cli", "main"]
