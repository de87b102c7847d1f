"""Benchmarks against real peers, in the same run on the same machine: ``python -m benchmarks`` as root.

What is compared, and against which budget: docs/benchmarks.md. Every benchmark is a module with a function
``rows(rounds)``, which lays out nodes and containers of its own, measures, and takes everything away again.
"""
