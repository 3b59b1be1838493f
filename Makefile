# Everything works from a fresh clone: `make demo`, `make test`. `make` alone lists the targets.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS := $(addprefix benchmarks/,parity.py rotary.py convert.py memory.py generate.py posgen.py posgen_step.py)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser mutants setup lint format notebooks docs bench dependencies

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## convert the tiny checkpoint, inspect it, generate past its training length
	$(BIN)/mlx-resonance demo

test: $(VENV)/.installed-test ## run the tests; more for pytest: make test PYTEST_ARGS="-n 2 -k rope"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-browser: $(VENV)/.installed-browser ## run notebooks in JupyterLab and Chromium; screenshots in build/screenshots
	$(BIN)/python -m pytest tests/browser

mutants: $(VENV)/.installed-test ## put faults into the kernel, one at a time: the tests must notice each
	$(BIN)/python tests/kernels/mutants.py

setup: $(VENV)/.installed-dev ## install the package as it lies here, with all that tests and checks need

lint: $(VENV)/.installed-dev ## check style and types, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## put the sources into the form that lint wants
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

ifeq ($(NOTEBOOKS),)
notebooks: ## run every notebook from start to end
	@echo "There are no notebooks yet."
else
notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python notebooks/run.py $(NOTEBOOKS)
endif

docs: $(VENV)/.installed-docs ## render the docstrings of the public names into build/docs
	$(BIN)/python docs/build.py build/docs

dependencies: # of all checks, without running any
	$(MAKE) --jobs=1 $(addprefix $(VENV)/.installed-,test dev docs notebooks browser)

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
