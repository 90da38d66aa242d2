# `make help` lists the targets. Everything runs in .venv, which the first target that needs it makes.

RECIPE ?= recipes/smollm2_offline.yaml
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-with-constraints

.DEFAULT_GOAL := help
.PHONY: help setup compat train test test-all gpu benchmark overoptimization docs lint format size clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Make .venv and install the tested set of packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "TRL 1.16 needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[setup] $(VENV): installing PyTorch (1 of 2) ..."
	@# torch first and alone, pinned: a looser range would fetch gigabytes of CUDA where a CPU build will do.
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@echo "[setup] $(VENV): installing TRL and the rest (2 of 2; a minute or two) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Whoever uses an export has these: TRL's PPOTrainer, last in 1.12, and transformers 4. torch as in .venv.
compat: setup ## Two more environments, for the slow tests of what is exported: TRL 1.12, transformers 4.57
	@for name in ppo transformers4; do \
		test -x $(VENV)-$$name/bin/python || $(BIN)/python -m venv $(VENV)-$$name || exit 1; \
		$(VENV)-$$name/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch || exit 1; \
	done
	@torch=$$(sed -n '/^torch==/p' constraints.txt); \
	$(VENV)-ppo/bin/pip install --quiet --disable-pip-version-check $$torch 'trl==1.12.*' 'transformers==5.24.*' peft && \
	$(VENV)-transformers4/bin/pip install --quiet --disable-pip-version-check $$torch 'transformers==4.57.*' \
		'sentence-transformers==5.7.*'

train: setup ## From nothing to an exported reward model [RECIPE=recipes/....yaml]
	@$(BIN)/rm-recipe run $(RECIPE)

test: setup ## The test suite, offline
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-all: setup ## The slow tests too
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m 'not gpu'

# The development copy of hh-rlhf, where it lies beside the repository.
HH_RLHF := ../shared/data/hh-rlhf

# Where PYTHON has the packages already, as on a machine without a package index, it is used as it is.
GPU_DATA ?= $(if $(wildcard $(HH_RLHF)),$(HH_RLHF),data/offline)
MODELS ?= models
OUTPUT ?= outputs/gpu

gpu: ## On a machine with a GPU: its tests and measurements, in ten minutes [OUTPUT=folder]
	@if $(PYTHON) -c 'import trl, peft, bitsandbytes' 2> /dev/null; then python=$(PYTHON); \
		else $(MAKE) --no-print-directory setup && python=$(BIN)/python || exit 1; fi; \
	test -d $(MODELS)/smollm2-135m-instruct || $$python -m rm_recipe prepare offline || exit 1; \
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} HF_HUB_OFFLINE=1 PYTHONPATH="$(CURDIR)" \
		$$python tests/gpu/measure.py --output $(OUTPUT) --data $(GPU_DATA) --models $(MODELS) $(GPU_ARGUMENTS)

benchmark: setup ## Speed and memory against stock TRL (about half an hour each on two cores)
	@$(BIN)/rm-recipe prepare offline
	@$(BIN)/rm-recipe benchmark $(RECIPE)
	@if [ -d $(HH_RLHF) ]; then $(BIN)/rm-recipe benchmark $(RECIPE) --lora_target_modules all-linear \
		--dataset_name $(HH_RLHF) --dataset_subsets '[helpful-base, harmless-base]' --leakage drop \
		--max_train_samples null --output outputs/benchmark_hh_rlhf; fi

# An experiment: when does a proxy stop being worth pleasing? Reward models of 100, 400 and 2,000 comparisons
# against one of others (gold); all by the offline recipe, but for what stands here.
OFFLINE := recipes/smollm2_offline.yaml
HALVES := data/overoptimization
JUDGES := outputs/overoptimization

# $(call train_once,NAME,DATA,KEYS): what is finished is left as it is.
define train_once
	@test -f $(JUDGES)/$(1)/run.json || $(BIN)/rm-recipe train $(OFFLINE) --overwrite --output_dir $(JUDGES)/$(1) \
		--dataset_name $(HALVES)/$(2) --save_strategy no --max_eval_samples 400 $(3)
	@test -f $(JUDGES)/$(1)/evaluation.json || $(BIN)/rm-recipe evaluate $(JUDGES)/$(1)
endef

overoptimization: setup ## Proxies of three sizes against gold, best of 32 (half an hour to an hour)
	@$(BIN)/rm-recipe prepare offline
	@mkdir -p $(HALVES)/proxy $(HALVES)/gold
	@head -n 2000 data/offline/train.jsonl > $(HALVES)/proxy/train.jsonl
	@tail -n +2001 data/offline/train.jsonl > $(HALVES)/gold/train.jsonl
	@cp data/offline/test.jsonl $(HALVES)/proxy && cp data/offline/test.jsonl $(HALVES)/gold
	$(call train_once,proxy_100,proxy,--max_train_samples 100 --num_train_epochs 4 --gradient_accumulation_steps 1)
	$(call train_once,proxy_400,proxy,--max_train_samples 400 --num_train_epochs 2 --gradient_accumulation_steps 2)
	$(call train_once,proxy_2000,proxy,--max_train_samples 2000)
	$(call train_once,gold,gold,--seed 1)
	@test -f $(JUDGES)/result/overoptimization.json || $(BIN)/rm-recipe overoptimization $(JUDGES)/proxy_100 $(JUDGES)/proxy_400 $(JUDGES)/proxy_2000 \
		--gold $(JUDGES)/gold --policy models/smollm2-135m-instruct --prompts data/offline/test.jsonl \
		--max-prompts 64 --n 32 --max-new-tokens 40 --output $(JUDGES)/result

docs: setup ## The pages as a site in outputs/site; also mends what they have from the code
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open outputs/site/index.html"

lint: setup ## Style and types
	@$(BIN)/ruff check rm_recipe tests
	@$(BIN)/ruff format --check rm_recipe tests
	@$(BIN)/mypy

format: setup ## Rewrite the code in the project's style
	@$(BIN)/ruff format rm_recipe tests
	@$(BIN)/ruff check --fix rm_recipe tests

size: setup ## How large and how entangled the code is
	@$(BIN)/python tests/size.py

clean: ## Remove .venv (those of compat, too) and caches; models/, data/ and outputs/ stay
	rm -rf $(VENV) $(VENV)-ppo $(VENV)-transformers4 .pytest_cache .mypy_cache .ruff_cache .hypothesis
