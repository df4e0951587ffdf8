# Every target sets up what it needs, from a fresh clone on: python3.11, make and git are enough.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.txt
READY := $(VENV)/.ready
STUBS := build/stubs/.ready
# `make lock UPGRADE=` keeps the pins that are there, and adds what is missing.
UPGRADE := --upgrade
COMPILE := $(BIN)/uv pip compile --quiet $(UPGRADE) --no-header --no-annotate --python-version 3.11 \
  pyproject.toml --extra dev --extra curate --extra posttrain --extra recall --extra lm-eval --extra tracking
# PyPI's builds of these break `import transformers` beside the CPU build of torch, and text models run without them.
NOT_NEEDED := torchvision torchaudio torchcodec
COMPILE_CPU := $(COMPILE) $(NOT_NEEDED:%=--no-emit-package %) requirements/cpu.in --extra cpu -o requirements/cpu.txt

# uv does not read pip's settings; these two it needs where there is a mirror or a folder of wheels.
empty :=
comma := ,
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))

# Where it is set, every process compiles torch, Ray and vLLM anew, ten seconds of a core each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup proto quickstart test drill lint format bench gpu-check k8s-check k8s-render lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) $(STUBS) ## environment in .venv, from requirements/cpu.txt

proto: $(STUBS) ## gRPC stubs from protos/, to build/stubs

quickstart: setup ## fuse two real models into a small target, end to end; results in runs/quickstart
	$(BIN)/fusion quickstart

test: setup ## all tests but those of `make drill`
	$(BIN)/python -m pytest

drill: setup ## what takes longer: faults, rolling updates, other servers, the manifests run on this machine
	$(BIN)/python -m pytest -m drill

lint: setup ## ruff, mypy --strict, the layers contract, buf lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/buf lint protos

format: setup ## ruff's fixes and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## all benchmarks in quick mode; results in runs/bench
	@mkdir -p runs/bench
	@for file in $$(grep -l __main__ tests/bench/*.py tests/bench/*/__main__.py \
	    tests/bench/corpus/teacher_seconds.py || true); do \
	  name=$$(echo $$file | sed 's,^tests/bench/,,; s,/__main__,,; s,\.py$$,,; s,/,.,g'); echo "== $$name"; \
	  $(BIN)/python -m tests.bench.$$name --quick --json runs/bench/$$name.json; \
	done

gpu-check: setup ## losses, step, workers, checkpoint, experts and projection on a GPU, in a few minutes; DEVICE=cpu tries it
	$(BIN)/python -m tests.gpu $(if $(DEVICE),--device $(DEVICE)) $(if $(JSON),--json $(JSON))

k8s-check: setup ## the manifests in k8s/, without a cluster; SCHEMAS=folder of KubeRay's CRD schemas
	$(BIN)/python -m tests.k8s.check $(if $(SCHEMAS),--schemas $(SCHEMAS))

k8s-render: setup ## the rendered folders of the overlays in k8s/, from their recipes
	$(BIN)/fusion k8s render quickstart --output k8s/overlays/cpu-dev/recipe
	$(BIN)/fusion k8s render k8s/recipes/gpu.yaml --output k8s/overlays/gpu/recipe
	$(BIN)/fusion k8s render k8s/recipes/external-sources.yaml --output k8s/overlays/external-sources/recipe
	$(BIN)/fusion k8s render k8s/recipes/recall.yaml --output k8s/overlays/recall/recipe

lock: $(READY) ## resolve requirements/*.in again, to the newest versions; UPGRADE= keeps today's pins
	$(COMPILE_CPU) 2>/dev/null || $(COMPILE_CPU) --torch-backend cpu
	env -u UV_FIND_LINKS $(COMPILE) --python-platform x86_64-manylinux_2_28 requirements/gpu.in --extra gpu \
	  -o requirements/gpu.txt
	$(BIN)/uv pip compile --quiet $(UPGRADE) --no-header --no-annotate --python-version 3.11 requirements/s3-server.in \
	  -o requirements/s3-server.txt

clean: ## remove everything that is generated, the environment included
	rm -rf $(VENV) build .import_linter_cache .mypy_cache .ruff_cache .pytest_cache

# torch apart: its CPU build comes from PIP_FIND_LINKS or from PyTorch's index, and asking both would mean waiting for
# the one that is not there. The rest comes from the package index alone. --no-deps: the lock is complete.
$(READY): $(LOCK) pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), f"Python 3.11 is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet "$$(grep '^uv==' $(LOCK))"
	torch=$$(grep '^torch==' $(LOCK)); \
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-index --quiet "$$torch" 2>/dev/null \
	  || $(BIN)/uv pip install --python $(BIN)/python --no-deps --torch-backend cpu "$$torch"
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -r $(LOCK)
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

$(STUBS): $(wildcard protos/fusion/v1/*.proto) protos/build_stubs.py $(READY)
	$(BIN)/python protos/build_stubs.py
	rm -rf $(VENV)/lib/python3.11/site-packages/fusion  # the installed copy, which would hide what was just made
	touch $@
