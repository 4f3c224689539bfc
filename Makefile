# PillSnap. `make` lists the targets. PYTHON=python3.12 chooses the interpreter that .venv is built on.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo golden test check clean-check export-check types lab docs bench clean

VENV ?= .venv
BIN := $(abspath $(VENV))/bin
RUN := _runs/demo
# processes of a test run: one more than cores, because tests often wait
PROCESSES ?= $(shell n=$$(nproc); echo $$((n < 8 ? n + 1 : 9)))
export VENV PYTHON
export PATH := $(BIN):$(PATH)
# a test run starts some hundred processes: they keep the compiled modules, whatever the shell says
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@awk -F': .*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## .venv with the pinned packages; does nothing when it is up to date
	@scripts/core/setup_venv.sh

demo: setup ## render synthetic pills, train, evaluate, export; prints the scorecard (minutes, no GPU, no network)
	@pillsnap run all --config demo
	@echo "try it       $(VENV)/bin/pillsnap predict PHOTO --mode single --run $(RUN)"

golden: setup ## compare the demo's run with the figures, tables and answers that were kept (after `make demo`)
	@test -f $(RUN)/reports/scorecard.json -a -d $(RUN)/export || { echo "make golden needs the demo's run, and there is none in $(RUN): run make demo first"; exit 1; }
	@python scripts/core/golden.py $(RUN)

# one thread for each process, and threads that sleep while they wait: there are as many processes as cores
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

test: setup ## format, lint, clean-check, export-check, every notebook, pytest
	@ruff format --check -q .
	@ruff check -q .
	@scripts/core/in_step.sh clean
	@scripts/core/in_step.sh export
	@PYTHONPATH=$(CURDIR)/tests/startup$${PYTHONPATH:+:$$PYTHONPATH} $(THREADS) JPY_SESSION_NAME=$(CURDIR)/nbs/as-in-the-lab.ipynb nbdev_test --n_workers $(PROCESSES) --skip_file_re '^(0[0-9]_|[_.])' # as a person sees them; papermill runs the stages without, pytest the guide's chapters
	@$(THREADS) python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

types: setup ## the package has the types that it states
	@basedpyright

FAST := house notebooks gates calibration metrics readme repository keys
check: setup ## what a commit must pass: format, lint, types, clean, export, readability, the fast tests (two minutes)
	@ruff format --check -q .
	@ruff check -q .
	@basedpyright
	@scripts/core/in_step.sh clean
	@scripts/core/in_step.sh export
	@python scripts/core/house.py
	@$(THREADS) python -m pytest -n $(PROCESSES) --dist loadfile $(wildcard $(FAST:%=tests/test_%.py))

clean-check: setup ## the notebooks are as nbdev_clean leaves them
	@scripts/core/in_step.sh clean

export-check: setup ## pillsnap/ is as nbdev_export writes it
	@scripts/core/in_step.sh export

lab: setup ## JupyterLab on the notebooks
	@cd nbs && jupyter lab

docs: setup ## the notebooks as a web site in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto, and there is no \`quarto\` on PATH: install it from https://quarto.org/docs/get-started/ and run this again"; exit 1; }
	@touch README.md  # newer than index.ipynb: it has its own maker, Quarto leaves it alone
	@nbdev_docs
	@rm -f nbs/nbdev.yml
	@echo "open _docs/index.html"

bench: setup ## every benchmark against its peers, an hour on an idle machine; PEERS=folder adds further peers
	@python benchmarks/run.py $(if $(PEERS),--peers $(PEERS))

clean: ## remove what builds and tests leave; keeps .venv and _runs
	@rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis nbs/nbdev.yml
	@find . -path ./$(VENV) -prune -o -path ./_runs -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
