# `make demo` installs everything beside this file and lets Gemma answer; `make test` tests it.

PYTHON ?= python3
BIN := .venv/bin
DEMO_MODEL := gemma-3-270m-int4
# Tests keep their compiled kernels and models here, away from those in use.
TEST_HOME := $(CURDIR)/.venv/test-home

.PHONY: demo test coverage fuzz kill guard determinism strings bench-gains bench-peers bench-quality lowest audit dist lint format clean

demo: .venv/installed-demo
	@$(BIN)/gemma-cli models 2>/dev/null | grep -q '$(DEMO_MODEL)' || $(BIN)/gemma-cli quantize demo
	@echo
	@echo '$$ gemma-cli run -m $(DEMO_MODEL) -n 40 -t 0 "The capital of France is"'
	@$(BIN)/gemma-cli run -m $(DEMO_MODEL) -n 40 -t 0 "The capital of France is"
	@echo
	@echo 'Next: $(BIN)/gemma-cli chat, $(BIN)/gemma-cli --help, or a checkpoint of your own (README.md).'

test: .venv/installed-dev
	GEMMA_CLI_HOME=$(TEST_HOME) $(BIN)/python -m pytest

# Lines of both packages that the tests run, but for tests that measure time, which counting takes,
# and kernels on other instruction sets. Kernels are compiled anew, so that what makes them is
# counted; then those of the quantizer run as Python, without the one test that would take minutes.
COVERAGE_HOME := $(CURDIR)/.venv/coverage-home
coverage: .venv/installed-dev
	rm -rf .coverage $(COVERAGE_HOME) && mkdir .coverage
	GEMMA_CLI_HOME=$(COVERAGE_HOME) $(BIN)/coverage run -m pytest \
		--ignore tests/test_kernels_apart.py --ignore tests/test_fuzz.py \
		--deselect "tests/test_hostile.py::test_tokenizer_model[2 million fields]"
	NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest tests/test_grouping.py tests/test_search.py \
		-k "not fitted_codebook"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Mutated files of every format for so long; tests/fuzz.py says what each must come to.
SECONDS ?= 600
fuzz: .venv/installed-dev
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS) --examples 500 --seed 1

# Conversions killed at random times; the test suite does so a few times too.
KILLS ?= 200
kill: .venv/installed-dev
	KILLS=$(KILLS) $(BIN)/python -m pytest tests/test_pipeline.py -k killed_at_any_time

# Answers of small models with 1, 2 and 4 threads, so many times each.
RUNS ?= 100
determinism: .venv/installed-dev
	RUNS=$(RUNS) GEMMA_CLI_HOME=$(TEST_HOME) $(BIN)/python -m pytest tests/test_determinism.py

# Random strings and very long ones through the tokenizer; tests/strings.py says what must come of it.
STRINGS ?= 100000
strings: .venv/installed-dev
	$(BIN)/python tests/strings.py --strings $(STRINGS)

# All kernels and whole models, on each instruction set of this machine, with every array between
# unreadable pages: right before the one, then right after the other.
guard: .venv/installed-dev
	@for set in $$($(BIN)/python -c 'from gemma_cli.runtime import isa; print(*isa.supported(isa.FEATURES))'); do \
		for side in end start; do \
			echo "$$set, at the $$side:"; \
			GEMMA_CLI_ISA=$$set GUARDED=$$side GEMMA_CLI_HOME=$(TEST_HOME) PYTHONPATH=.:tests \
			$(BIN)/python -m pytest -x -p gemma_cli.runtime.isa -p guarded -p no:cacheprovider \
			tests/test_kernels.py tests/test_model.py || exit 1; \
		done; \
	done

# Measures beside itself: contexts, batches, drafts, memory; tests/bench_gains.py says what ARGS are.
bench-gains: .venv/installed-dev
	@$(BIN)/python tests/bench_gains.py $(ARGS)

# Measures beside llama.cpp; tests/bench_peers.py says what it needs and what ARGS can be.
bench-peers: .venv/installed-dev
	@$(BIN)/python tests/bench_peers.py $(ARGS)

# What quantizing costs, beside llama.cpp; tests/bench_quality.py says what ARGS must be.
bench-quality: .venv/installed-dev
	@$(BIN)/python tests/bench_quality.py $(ARGS)

# The oldest packages that pyproject.toml allows, in an environment of their own, and the tests of
# what is built on them.
LOWEST := $(addprefix tests/test_,golden.py machine_code.py checkpoint_gguf.py tokenizer.py \
	snapshot.py pipelines.py constraint.py plots.py hub.py chat_terminal.py markdown.py)
lowest: .venv-lowest/installed
	GEMMA_CLI_HOME=$(CURDIR)/.venv-lowest/test-home .venv-lowest/bin/python -m pytest \
		-p no:cacheprovider $(LOWEST)

# Published advisories for what is installed.
audit: .venv/installed-dev .venv-audit/bin/pip-audit
	$(BIN)/pip freeze --exclude-editable > .venv-audit/installed.txt
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r .venv-audit/installed.txt

# The wheel and the source distribution, in dist/; tests/dist.py says what they are put through.
dist: .venv/installed-dev
	$(BIN)/python tests/dist.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .coverage .venv .venv-lowest .venv-audit build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv-audit/bin/pip-audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit

# Each `name>=version` of pyproject.toml is taken at its word; tools of the tests are the newest.
.venv-lowest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	sed -n '/^dependencies/,/^dev = /s/.*"\([^">]*\)>=\([^";]*\).*/\1==\2/p' pyproject.toml \
		> .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check \
		-c .venv-lowest/constraints.txt -e '.[constrained,hub,plot]' hypothesis jsonschema pyte pytest
	@touch $@

.venv/installed-demo: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,dev]'
	@touch $@
