# `make demo` and `make test` set everything up by themselves, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH = 1
# Installs write no bytecode (--no-compile): the first import of a module does, and little of torch is ever imported.
unexport PYTHONDONTWRITEBYTECODE
# Kernels for the device that is here, or for one architecture; a wheel has those for each.
DEVICE = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
CUDA_ARCHITECTURES = $(or $(MMKERN_CUDA_ARCHITECTURES),$(patsubst 90,90a,$(or $(DEVICE),90)))
NATIVE := setup.py pyproject.toml $(shell find csrc bindings -type f)

.PHONY: demo test test-fast test-matrix lint format bench bench-check gpu-report gpu sanitize docs-memory wheel clean

# Threads that wait for each other in a loop, two to a core, would take most of the tests' time.
test test-fast test-matrix sanitize: export OMP_WAIT_POLICY = passive

demo: $(VENV)/.demo
	$(BIN)/python -m mmkern demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n auto -m "not slow"

test-matrix: $(VENV)/.test
	$(BIN)/python tools/test_matrix.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

bench: $(VENV)/.test
	$(BIN)/python -m mmkern bench

bench-check: $(VENV)/.test
	$(BIN)/python -m mmkern bench --check

gpu-report: $(VENV)/.test
	$(BIN)/python tools/gpu_report.py

gpu: $(VENV)/.test
	$(BIN)/python tools/gpu.py

sanitize: $(VENV)/.test
	$(BIN)/python tools/sanitize.py

docs-memory: $(VENV)/.test
	$(BIN)/python tools/measure_allocators.py

wheel: $(VENV)/.test
	$(BIN)/python tools/wheel.py

$(VENV)/.torch: requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "$$(grep '^torch==' requirements-test.txt)"
	$(BIN)/pip install --quiet --no-compile $$(grep -E '^(numpy|setuptools|pybind11|ninja)==' requirements-test.txt)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(NATIVE)
	MMKERN_CUDA_ARCHITECTURES="$(CUDA_ARCHITECTURES)" \
		$(BIN)/pip install --quiet --no-compile --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.built
	$(BIN)/pip install --quiet --no-compile $$(grep -E '^(scikit-learn|matplotlib|rich)==' requirements-test.txt)
	touch $@

$(VENV)/.test: $(VENV)/.built requirements-test.txt
	$(BIN)/pip install --quiet --no-compile -r requirements-test.txt
	$(BIN)/pip install --quiet --no-compile --no-deps open_clip_torch==3.3.0 # for its loss.py; the rest asks for torchvision
	touch $@

clean:
	rm -rf build dist *.egg-info mmkern/_C*.so mmkern/_cuda*.so mmkern/_build.json
