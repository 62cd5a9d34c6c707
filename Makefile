# Everything sets itself up: a virtual environment in .venv with the versions that constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# uv installs in a sixth of the time; where it can not reach an index (it does not read pip's settings), pip does it.
INSTALL = $(BIN)/uv pip install --quiet --native-tls --python $(BIN)/python --constraint constraints.txt --editable $(1) \
	|| $(PIP) --constraint constraints.txt --editable $(1)

.PHONY: demo test check format reference clean

demo: $(VENV)/.installed
	@$(BIN)/tunesmith demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --quiet

check: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.developing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.developing
	$(BIN)/python scripts/write_reference.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing tunesmith into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt uv
	@$(call INSTALL,'.[cpu]')
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@$(call INSTALL,'.[dev]')
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache
