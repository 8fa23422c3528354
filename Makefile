# make demo | make test | make bench [NAME=views] | make lint — each makes .venv first, if it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# Processes that share cores must not spin for each other (measured: 5-25x the CPU time).
export OMP_WAIT_POLICY ?= passive

print-python:
	@echo $(PYTHON)

.PHONY: print-python demo test test-fast bench lint wheel clean

$(BIN)/.ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lemon_muse needs Python 3.11 or newer; give it with: make PYTHON=python3.11"; exit 2; }
	@echo "installing lemon_muse and what it needs into $(VENV) (a few minutes, about 6 GB with torch)"
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "python has no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

demo: $(BIN)/.ready
	$(BIN)/lemon-muse demo out=runs/demo

# Two processes on two cores; the SLURM drills have one cluster and run alone.
test: $(BIN)/.ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not slurm" -n 2 --dist loadfile
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m slurm tests/slurm

test-fast: $(BIN)/.ready
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

bench: $(BIN)/.ready
	$(BIN)/python -m tests.performance $(NAME)

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy lemon_muse data_prep eval launch

wheel: $(BIN)/.ready
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
