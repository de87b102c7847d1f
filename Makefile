# moorage. The two commands of the README: sudo make demo, sudo make test.

.PHONY: help setup tools check test demo lab-demo marathon-demo histories bench clean
.DEFAULT_GOAL := help

PACKAGES := moorage netmodules marathon isolator ipam
SOURCES := setup.py constraints.txt scripts/setup $(shell find bin $(PACKAGES) -type f ! -name '*.pyc')
PYTHON := .venv/bin/python
# Tests of one xdist group share a worker, one after the other: @pytest.mark.xdist_group("...").
PYTEST := $(PYTHON) -m pytest -n 2 --dist loadgroup
# Unit tests write thousands of small files durably; in memory that costs nothing, where there is enough of it.
FAST := $(shell [ "$$(df --output=avail -B1M /dev/shm 2>/dev/null | tail -1)" -ge 2048 ] 2>/dev/null && echo TMPDIR=/dev/shm)

help:
	@echo "make demo      see it work: six containers on a node of their own     (root)"
	@echo "make lab-demo  see a cluster work: three nodes, each fabric          (root)"
	@echo "make marathon-demo  see a stale address found and released           (root)"
	@echo "make test      everything is tested, with real namespaces             (root)"
	@echo "make histories longer ones of the random histories (LENGTH, SEED)     (root)"
	@echo "make check     ruff, mypy and the unit tests, in two minutes"
	@echo "make bench     against the reference CNI plugins                      (root)"
	@echo "make setup     system packages and .venv only"
	@echo "make clean     remove .venv and what tools left behind"

setup: .venv/installed
tools: .venv/tools

.venv/installed: $(SOURCES)
	scripts/setup
	@touch $@

.venv/tools: $(SOURCES) pyproject.toml
	scripts/setup --test
	@touch .venv/installed $@

check: tools
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(FAST) $(PYTEST) -m "not kernel and not etcd and not slow"

test: root tools
	$(PYTEST)

# The random histories alone, and longer: sudo make histories LENGTH=10 SEED=7
LENGTH ?= 4
histories: root tools
	HISTORY_LENGTH=$(LENGTH) HISTORY_SEED=$(SEED) $(PYTHON) -m pytest -m history

demo: root setup
	scripts/demo

lab-demo: root tools
	scripts/lab-demo

marathon-demo: root tools
	scripts/marathon-demo

bench: root tools
	$(PYTHON) -m benchmarks

.PHONY: root
root:
	@[ "$$(id -u)" -eq 0 ] || { echo "network namespaces need root: sudo make $(MAKECMDGOALS)" >&2; exit 1; }

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
