# The two commands: `make repro` and `make test`. Each is enough by itself on a fresh machine.
PYTHON ?= python3
VENV := .venv
PORT ?= 5000
JOBS ?= 1
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help install repro smoke compare test test-slow test-gpu mutants lint ui clean

install: $(VENV)/.installed  ## Make .venv with the exact versions of requirements.lock; CPU=1 leaves CUDA out

$(VENV)/.installed: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
ifdef CPU
	$(VENV)/bin/python -m pip install --quiet --no-deps --index-url $(TORCH_INDEX) \
		$$(grep -oE '^(torch|torchvision)==[0-9.]+' requirements.lock)
	sed -E '/^(nvidia-|cuda-)|^(torch|torchvision|triton)==/,/[^\]$$/d' requirements.lock > $(VENV)/cpu.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps --requirement $(VENV)/cpu.lock
else
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.lock
endif
	touch $@

repro: install  ## Build everything that is out of date, JOBS rows at a time, and print the scoreboard
	python -m stages check
	python -m stages repro --jobs $(JOBS)
	@python -m stages report --show

smoke: install  ## In a minute: check params.yaml, and train, fit, draw and score on packaged digits in Python
	python -m stages check
	python -m examples.quickstart

compare: install  ## Compare settings, scores and samples with the last commit's, or with REV
	@python -m stages compare $(REV)

test: install  ## Run the tests
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-slow: install  ## Run the slow tests: kills, memory, long fuzzing
	python -m pytest -m "slow and not gpu"

test-gpu: install  ## Run the tests that only a GPU can tell, on a machine with one
	python -m pytest -m gpu

mutants: install  ## Plant the faults of tests/mutants.yaml, one at a time, and tell which of them the tests notice
	python -m tests.mutants

lint: install  ## Check style, annotations, docstrings and types
	ruff check .
	ruff format --check .
	mypy

ui: install  ## Browse the runs at http://127.0.0.1:5000, or another PORT
	@python -c 'import socket; socket.create_server(("127.0.0.1", $(PORT)))' 2>/dev/null || \
		{ echo 'Port $(PORT) is taken: choose another one, as in `make ui PORT=5001`.' >&2; exit 1; }
	@echo 'Runs:   http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning'
	@echo 'After the first report (make repro):'
	@echo 'Scores: http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=scores'
	@echo 'Rows:   http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=rows'
	@python -m stages.tracking.database
	mlflow ui --workers 1 --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} --host 127.0.0.1 --port $(PORT)

help:  ## List these commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 12

clean:  ## Remove what the pipeline made; DVC's cache and the MLflow database stay
	rm -rf data/shards data/autoencoders data/codes data/densities data/samples data/features .checkpoints
	rm -rf reports/metrics reports/curves reports/figures reports/arrays reports/runs reports/report.md reports/index.html reports/scoreboard.csv reports/compare reports/combined
