# make demo        sets up .venv with what a demo needs and does the main job: one HTML page, images -> 3D -> actions
# make test        sets up .venv with everything and passes linter, type checker and tests
# make test-slow   the tests that take some seconds or more each, which `make test` leaves out
# make test-avx2   the tests that compute, once more as an older processor would
# make docs        builds the documentation as a site with search: site/index.html
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OUT ?= runs/demo

.PHONY: demo test test-slow test-avx2 docs setup lint types pytest clean

demo: $(VENV)/.ready-demo
	$(BIN)/spear demo --out $(OUT) $(if $(DATA),--data $(DATA))

# The type checker runs beside the tests, some of which only wait.
test: setup
	$(MAKE) --no-print-directory -j2 lint types pytest

docs: $(VENV)/.ready-docs
	$(BIN)/mkdocs build --strict

setup: $(VENV)/.ready-dev

# .ready-NAME: the extra NAME of pyproject.toml is installed.
$(VENV)/.ready-%: pyproject.toml scripts/setup.sh scripts/constraints.txt
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/setup.sh $*
	touch $@

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

# Each file runs in one process, so that what its tests share is made once.
pytest:
	OMP_NUM_THREADS=1 PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test-slow: setup
	OMP_NUM_THREADS=1 PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --durations=10

# The networks, the losses and the memory plan on other instructions than this processor's newest.
test-avx2: setup
	OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	    $(BIN)/python -m pytest -n 2 tests/models/*.py tests/train/test_memory.py tests/test_flow.py

clean:
	rm -rf $(VENV) runs site
