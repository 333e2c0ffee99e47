# make demo   sets up .venv and does the main job: one HTML page, images -> 3D -> actions
# make test   sets up .venv and passes everything
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
OUT ?= runs/demo

.PHONY: demo test setup lint types pytest clean

demo: setup
	$(BIN)/spear demo --out $(OUT) $(if $(DATA),--data $(DATA))

test: setup lint types pytest

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/setup.sh
	touch $@

lint:
	$(BIN)/ruff check .

types:
	$(BIN)/mypy

pytest:
	$(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) runs
