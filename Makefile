# make demo   set up, then run the sweep of the README; TORCH_INDEX=URL takes torch from that index, such as one for CPUs
# make test   set up, then run the tests            make test-fast   those that need no Ray
# make test-gpu  the first quarter of an hour on a GPU: tests and figures, in build/gpu; without one, what simulates it
# make check  format, lint, types                   make ci          what CI runs
# make test-long  other variants of what `make test` tests, and whole runs of examples (8 minutes)
# make test-tools  what needs g++, ssh, PostgreSQL, zsh, fish or Fashion-MNIST, which a fresh machine lacks (as root, after apt-get)
# make test-docs  the commands, code and notebook of README and docs, as they stand there (8 minutes)
# make docs   docs/ as a site, in build/site; a link that leads nowhere fails it
# make docs-outputs  run what README and docs show, and write its output there (some minutes)
# make test-faults  kills, signals, bad disks, ... (about 40 minutes)      make test-faults-short  3 minutes of them
# make soak   half an hour of sweeps with random faults; fails if something grows (MINUTES=5: shorter)
# make fuzz   5,000 files, commands and data as nobody would write them; `make test` takes 50 (TFKD_FUZZ_SEED=n: the same again)
# make test-cluster  real clusters: by ssh, nodes that come and go, hosts cut off (some minutes; as root, with sshd, rsync, ip)
# make test-cluster-short  4 minutes of them, on loopback, by anyone
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo torch test test-fast test-long test-tools test-docs test-faults test-faults-short soak test-browser test-cluster test-cluster-short test-gpu fuzz check docs docs-outputs ci format clean

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED := 0
# else each of some hundred processes of the tests would compile the sources anew
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n 's/^# make/make/p' Makefile

TORCH_INDEX ?= $(shell cat $(VENV)/.torch_index 2>/dev/null)
ifneq ($(and $(TORCH_INDEX),$(wildcard $(BIN)/python)),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch_index 2>/dev/null))
$(error TORCH_INDEX: torch in $(VENV) is from elsewhere; remove it first, with: make clean)
endif
endif

PIP = $(BIN)/python -m pip install --disable-pip-version-check
# sizes on disk of the versions in constraints.txt; tests/test_setup.py adds them up
SIZE_OF_TORCH := 5.5 GB
SIZE_BESIDE_IT := 1 GB
SIZE_FOR_TESTS := 0.6 GB

torch:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not here; name a Python 3.11 with: make PYTHON=..."; exit 2; }
	@echo "set-up: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo '$(TORCH_INDEX)' > $(VENV)/.torch_index
ifeq ($(TORCH_INDEX),)
	@echo "set-up: torch for Linux is a build for CUDA, which takes $(SIZE_OF_TORCH) on disk, and the other packages $(SIZE_BESIDE_IT)."
	@echo "set-up: without a GPU, name an index that has a build for CPUs: make demo TORCH_INDEX=URL"
else
	@echo "set-up: installing torch from $(TORCH_INDEX); the other packages take $(SIZE_BESIDE_IT) on disk"
	@$(PIP) --no-deps --index-url '$(TORCH_INDEX)' $$(grep -E '^torch(vision)?==' constraints.txt)
endif

# what the sweep needs, for those who only look
$(VENV)/.runs: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory torch
	@echo "set-up: installing tfkd_ray and the packages that it needs"
	@$(PIP) --constraint constraints.txt --editable . 2> >(grep -v 'it is neither a file nor a directory' >&2)
	@touch $@
	@echo "set-up: done"

# installed again only when what is to be installed changes
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory torch
	@echo "set-up: installing tfkd_ray, the packages that it needs, and those of its tests ($(SIZE_FOR_TESTS))"
	@$(PIP) --constraint constraints.txt --editable '.[dev]' 2> >(grep -v 'it is neither a file nor a directory' >&2)
	@touch $@
	@echo "set-up: done"

demo: $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(VENV)/.runs)
	@echo "demo: tfkd tune search_spaces/digits_tfkd.yaml"
	@PATH="$$PWD/$(BIN):$$PATH" tfkd tune search_spaces/digits_tfkd.yaml
	@echo
	@echo "(tfkd is in $(BIN): run 'source $(BIN)/activate' first)"

test: $(VENV)/.installed
	@echo "test: all but the marks 'long', 'docs', 'fault', 'browser', 'cluster', 'tools' and 'gpu', on three processes, two of which have a Ray cluster"
	@$(BIN)/python -m pytest -m 'not long and not docs and not fault and not browser and not cluster and not tools and not gpu' -n 3 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-long: $(VENV)/.installed
	@echo "test-long: other variants of what 'make test' tests, and whole runs of examples"
	@$(BIN)/python -m pytest -m 'long and not fault and not browser and not cluster' -n 3 --dist loadgroup --no-loadscope-reorder $(ARGS)

TOOLS := g++ openssh-client procps postgresql dataset-fashion-mnist zsh fish
test-tools: $(VENV)/.installed
	@command -v g++ >/dev/null && command -v ssh >/dev/null && command -v pkill >/dev/null && command -v zsh >/dev/null && command -v fish >/dev/null && ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
		&& test -d /usr/share/datasets/fashion-mnist || { echo "test-tools: needs, as root: apt-get install $(TOOLS)"; exit 2; }
	@$(BIN)/python -m pytest -m 'tools and not fault and not cluster $(SOME)' $(ARGS)

test-docs: $(VENV)/.installed
	@$(BIN)/python -m pytest -m docs $(ARGS)

test-fast: $(VENV)/.installed
	@$(BIN)/python -m pytest -m 'not long and not ray and not slow and not docs and not fault and not browser and not cluster and not tools and not gpu' -n 2 --dist loadfile $(ARGS)

test-faults: $(VENV)/.installed
	@$(BIN)/python -m pytest -m fault $(ARGS)
	@echo "test-faults: nodes that are lost, a machine switched off, Ctrl-C on a terminal, an experiment of an earlier release"
	@$(BIN)/python -m pytest tests/test_cluster_nodes.py tests/test_cli.py tests/test_release.py \
		-m '' -k 'that_dies or loses_a_node or switched_off or ctrl_c or release' $(ARGS)

test-faults-short: $(VENV)/.installed
	@$(BIN)/python -m pytest -m 'fault and not slow' -n 2 --dist loadgroup --no-loadscope-reorder $(ARGS)

MINUTES ?= 30
soak: $(VENV)/.installed
	@$(BIN)/python benchmarks/soak.py --minutes $(MINUTES)

test-browser: $(VENV)/.installed
	@command -v chromium >/dev/null || { echo "test-browser: needs Chromium: apt-get install chromium"; exit 2; }
	@$(BIN)/python -m pytest -m browser $(ARGS)
	@echo "test-browser: screenshots are in test-artifacts/"

test-gpu: $(VENV)/.installed
	@$(BIN)/python benchmarks/gpu_steps.py $(ARGS)

fuzz: $(VENV)/.installed
	@seed=$${TFKD_FUZZ_SEED:-$$(date +%s)}; count=$${TFKD_FUZZ:-5000}; \
	echo "fuzz: $$count files; the same ones again: make fuzz TFKD_FUZZ=$$count TFKD_FUZZ_SEED=$$seed"; \
	TFKD_FUZZ=$$count TFKD_FUZZ_SEED=$$seed $(BIN)/python -m pytest tests/test_fuzz.py tests/test_damage.py \
		tests/test_roundtrip.py tests/test_cli_fuzz.py --hypothesis-seed $$seed --timeout 1800 -n 2 $(ARGS)

test-cluster: $(VENV)/.installed
	@command -v rsync >/dev/null && command -v ip >/dev/null && test -x /usr/sbin/sshd || { echo "test-cluster: needs, as root: apt-get install openssh-server rsync iproute2"; exit 2; }
	@$(BIN)/python -m pytest -m cluster $(ARGS)

test-cluster-short: $(VENV)/.installed
	@$(BIN)/python -m pytest -m 'cluster and not slow' $(ARGS)

check: $(VENV)/.installed
	@$(BIN)/ruff format --check --quiet . || { echo "check: run 'make format'"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@echo "check: format, lint and types are fine"

$(VENV)/.docs: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]' \
		2> >(grep -v 'it is neither a file nor a directory' >&2)
	@touch $@

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "docs: build/site/index.html"

docs-outputs: $(VENV)/.installed
	@$(BIN)/python docs/outputs.py $(ARGS)

# the tests of faults and of clusters wait much: beside them others have a processor; those of
# clusters run `ray stop`, which ends every Ray of this machine, so nothing beside them uses one
ci: $(VENV)/.installed
	@$(MAKE) --jobs 2 --output-sync=target check docs
	@$(MAKE) test
	@$(MAKE) --jobs 2 --output-sync=target test-docs test-faults-short test-tools SOME='and ray'
	@$(MAKE) --jobs 2 --output-sync=target test-cluster-short test-browser test-tools SOME='and not ray'

format: $(VENV)/.installed
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
