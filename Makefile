# Everything happens in .venv inside the checkout; `make` alone says what there is.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
EXAMPLES := examples/hello.py examples/nearest_neighbor.py examples/linear_system.py

# The embedded AWS, whatever the user's own Dask configuration says: nothing here touches an account.
export DASK_DASK_LAMBDA__BACKEND := local
# The environment in .venv is the whole environment.
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv demo test soak lint conformance packaging bench bench-peers clean

help: ## Say what the targets are
	@echo "dask_lambda: Dask on AWS Lambda and S3"
	@echo
	@awk -F ':.*## ' '/^[-.a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.13 make ... chooses another Python (3.11 or newer)."

.venv: $(INSTALLED) ## Make the virtual environment (the other targets do it by themselves)

$(INSTALLED): setup.cfg
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); \
	    ok or print("dask_lambda needs Python 3.11 or newer, but $(PYTHON) is " \
	    + sys.version.split()[0] + ": try make PYTHON=python3.12"); sys.exit(not ok)'
	@echo "==> Installing into $(VENV) (the first time this takes a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade pip
	@$(BIN)/python -m pip install -qq --editable '.[local,test,examples]'
	@touch $@

demo: $(INSTALLED) ## Run the first three examples on an embedded AWS
	@set -e; for example in $(EXAMPLES); do \
	    echo; echo "==> python $$example"; $(BIN)/python $$example; \
	done

# What tests and benchmarks put into temporary files stays in the checkout.
test soak conformance packaging bench bench-peers: export TMPDIR := $(CURDIR)/$(VENV)/tmp

$(VENV)/tmp: $(INSTALLED)
	@mkdir -p $@

# So many processes share the tests, each with an embedded AWS of its own: they wait as much as they
# compute, and two cores are busy with two. JOBS=0 runs them one after the other, in this process.
JOBS ?= 2

test: $(INSTALLED) $(VENV)/tmp ## Run our tests, then a sample of Dask's own tests on Lambda
	@echo "==> Our tests"
	@$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile
	@echo "==> Dask's own tests (a sample)"
	@$(BIN)/python -m tests.conformance --sample -n $(JOBS) --dist worksteal
	@echo "==> Part of them with one invocation for each task"
	@DASK_DASK_LAMBDA__PLAN=none $(BIN)/python -m tests.conformance --sample \
	    dask.tests.test_delayed dask.bag.tests.test_bag dask.array.tests.test_reductions \
	    -n $(JOBS) --dist worksteal
	@echo "==> distributed's own tests of its client, on a LambdaCluster"
	@$(BIN)/python -m tests.distributed_conformance -n $(JOBS)

# SOAK="--seed 7 --runs 1" repeats one run; --help says what else there is.
SOAK ?= --minutes 15

soak: $(INSTALLED) $(VENV)/tmp ## Run mixed graphs under random faults (a quarter of an hour)
	@$(BIN)/python -m tests.faults.soak $(SOAK)

lint: $(INSTALLED) ## Check style and types
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

conformance: $(INSTALLED) $(VENV)/tmp ## Run all of Dask's array, bag, delayed and dataframe tests on Lambda (hours)
	@$(BIN)/python -m tests.conformance --all

packaging: $(INSTALLED) $(VENV)/tmp ## Import all of the packaged environment, deploy and measure it
	@$(BIN)/python -m pytest tests/test_packaged.py tests/test_deploy.py -m 'exhaustive or slow'
	@$(BIN)/python -m benchmarks.packaging

bench: $(INSTALLED) $(VENV)/tmp ## Run the benchmarks
	@$(BIN)/python -m benchmarks.overhead
	@$(BIN)/python -m benchmarks.overhead --memory
	@$(BIN)/python -m benchmarks.faces
	@$(BIN)/python -m benchmarks.faces_cluster
	@$(BIN)/python -m benchmarks.plans
	@$(BIN)/python -m benchmarks.cold_start
	@$(BIN)/python -m benchmarks.compression
	@$(BIN)/python -m benchmarks.resume
	@$(BIN)/python -m benchmarks.faults
	@$(BIN)/python -m benchmarks.aws_model --small
	@$(BIN)/python -m benchmarks.estimates
	@$(MAKE) --no-print-directory bench-peers

# The systems that dask_lambda is measured next to live in environments of their own.
# BENCH_PEERS="--size small --plot peers.png" is a quick look; --help says what else there is.
BENCH_PEERS ?=
PEERS := $(VENV)/peers/cubed/installed $(VENV)/peers/lithops/installed

bench-peers: $(INSTALLED) $(VENV)/tmp $(PEERS) ## Run dask_lambda next to its peers (a quarter of an hour)
	@$(BIN)/python -m benchmarks.peers $(BENCH_PEERS)

$(PEERS): $(VENV)/peers/%/installed: benchmarks/peers/requirements-%.txt | $(INSTALLED)
	@echo "==> Installing $* into $(@D)"
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --upgrade pip
	@$(@D)/bin/python -m pip install -qq --requirement $<
	@touch $@

clean: ## Remove what make made
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
