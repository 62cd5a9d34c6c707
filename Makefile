# Everything sets itself up: a virtual environment in .venv with the versions that constraints.txt pins.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Python keeps what it compiles, whatever the environment says: without, every process that imports torch and
# transformers compiles them anew, 27 s of a core instead of 11, because uv compiles nothing when it installs.
unexport PYTHONDONTWRITEBYTECODE
PINS := $(VENV)/constraints.txt
# uv installs in a sixth of the time, and compares every file with its digests: one that differs ends it. Where uv can
# not reach an index (it does not read pip's settings), pip does it, by versions alone: it takes digests for all or none.
define INSTALL
	@$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --constraint constraints.txt --editable $(1) \
		2> $(VENV)/uv.log || { cat $(VENV)/uv.log >&2; ! grep --quiet "Hash mismatch" $(VENV)/uv.log \
		&& $(PIP) --constraint $(PINS) --editable $(1); }
endef

.PHONY: demo test pytest test-long test-machines check style types format reference catalogue constraints clean

demo: $(VENV)/.installed
	@$(BIN)/tunesmith demo

# Types are checked, on one core, while the tests run.
test: style
	@$(MAKE) --no-print-directory --jobs 2 types pytest

pytest: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet

# All cases of every test: `make test` runs a few of each of the largest matrices.
test-long: $(VENV)/.developing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" --numprocesses 2 --dist worksteal --quiet

# The tests that depend on the machine, once more on others: see scripts/test_machines.py.
test-machines: $(VENV)/.developing
	@$(BIN)/python scripts/test_machines.py $(ONLY)

check: style types

style: $(VENV)/.developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developing
	$(BIN)/pyright

format: $(VENV)/.developing
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/.developing
	$(BIN)/python scripts/write_reference.py

# The messages that the code says, into the translations of src/tunesmith/locale.
catalogue: $(VENV)/.developing
	$(BIN)/python scripts/write_catalogue.py

# Raises the named packages, or `--all`: make constraints RAISE="transformers peft"
constraints: $(VENV)/.developing
	$(BIN)/python scripts/write_constraints.py $(RAISE)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing tunesmith into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@sed 's/ --hash=.*//' constraints.txt > $(PINS)
	@grep '^uv==' constraints.txt > $(VENV)/uv.txt
	@$(PIP) --require-hashes --requirement $(VENV)/uv.txt
	$(call INSTALL,'.[cpu]')
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(call INSTALL,'.[dev]')
	@touch $@

clean:
	rm -rf $(VENV) .venv-* build dist src/*.egg-info .pytest_cache .ruff_cache
