# Everything works from a fresh clone: `make demo`, `make test`. `make` alone lists the targets.

PYTHON ?= python3
# One process per core, up to eight. The tests of a file stay in one process, which makes what they share once.
PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist loadfile

VENV := .venv
BIN := $(VENV)/bin
# One thread per process: the processes share the cores.
PYTEST := OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1} OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
MUTANTS := $(BIN)/python tests/kernels/mutants.py
BENCHMARKS := $(addprefix benchmarks/,parity.py rotary.py convert.py memory.py generate.py posgen.py posgen_step.py)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-browser mutants mutants-if-changed setup lint format notebooks docs bench
.PHONY: dependencies

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## convert the tiny checkpoint, inspect it, generate past its training length
	$(BIN)/mlx-resonance demo

test: $(VENV)/.installed-test ## run the tests; other arguments for pytest: make test PYTEST_ARGS="-k rope"
	$(PYTEST) $(PYTEST_ARGS)

test-long: $(VENV)/.installed-test ## run the tests that take minutes, and all mutants
	status=0; $(PYTEST) -m long $(PYTEST_ARGS) || status=1; $(MUTANTS) || status=1; exit $$status

test-browser: $(VENV)/.installed-browser ## run notebooks in JupyterLab and Chromium; screenshots in build/screenshots
	$(PYTEST) tests/browser

mutants: $(VENV)/.installed-test ## put faults into the kernel, one at a time: the tests must notice each
	$(MUTANTS)

mutants-if-changed: $(VENV)/.installed-test ## the same, unless the kernel and its tests are as in mutants.sha256
	$(MUTANTS) --if-changed

setup: $(VENV)/.installed-dev ## install the package in editable mode, with everything for tests and checks

lint: $(VENV)/.installed-lint ## check style and types, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-lint ## format the sources as lint expects
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(VENV)/.installed-notebooks ## run every notebook, each in a fresh kernel
	$(BIN)/python notebooks/run.py $(NOTEBOOKS)

docs: $(VENV)/.installed-docs ## render the docstrings of the public names into build/docs
	$(BIN)/python docs/build.py build/docs

dependencies: # of all checks, one pip at a time
	$(MAKE) --jobs=1 $(addprefix $(VENV)/.installed-,test lint docs notebooks browser)

bench: $(VENV)/.installed-test ## measure the numbers that need no arguments; each script ends in one JSON line
	for script in $(BENCHMARKS); do $(BIN)/python "$$script" || exit 1; done

# One stamp per set of dependencies: pip runs again only after a change of these two files.
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.created
	$(BIN)/python -m pip install -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml setup.py | $(VENV)/.created
	$(BIN)/python -m pip install -e '.[$*]'
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed, for example: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
