# Everything runs in .venv, which the first target that needs it makes. PYTHON=... chooses the interpreter.

PYTHON ?=
BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := CMakeLists.txt $(wildcard src/fewbit/native/*)

.DEFAULT_GOAL := help
.PHONY: help venv demo docs lint test test-slow test-sanitize test-emulated test-aarch64 test-gpu-static test-vllm
.PHONY: test-schema test-storm test-threads fuzz lock audit wheel bench-robustness
.PHONY: bench bench-encode bench-kernels bench-peers bench-quality bench-twinquant bench-speed bench-big bench-report
.PHONY: tables clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

$(STAMP): pyproject.toml constraints.txt requirements.lock requirements-cpu.lock requirements-cuda.lock scripts/make_venv.sh scripts/packages.sh $(NATIVE)
	@sh scripts/make_venv.sh $(PYTHON)
	@touch $@

venv: $(STAMP)  ## Make .venv and install fewbit into it

demo: $(STAMP)  ## Compress a real 135M model to 3 bits, measure it, generate with it
	@$(BIN)/fewbit demo

docs: $(STAMP)  ## Build the documentation's site into build/site
	$(BIN)/mkdocs build --strict

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint  ## Check style and types, then run the fast tests
	@sh scripts/browser.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-slow: $(STAMP)  ## Run the tests on the real model (fetched once, some 100 MB)
	$(BIN)/python -m pytest -q -m slow

test-sanitize: $(STAMP)  ## Run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (minutes)
	@sh scripts/test_sanitize.sh

test-threads: $(STAMP)  ## Run the pool of threads under ThreadSanitizer, and one engine from many threads
	$(BIN)/python -m pytest -q tests/native/test_threads.py tests/robustness/test_threads.py

test-emulated: $(STAMP)  ## Run the kernels of AVX-512, AMX and AVX-VNNI on any AVX2 machine, emulated (long)
	@sh scripts/test_emulated.sh

test-aarch64: $(STAMP)  ## Run the portable kernels on emulated aarch64
	@sh scripts/test_aarch64.sh

test-gpu-static: $(STAMP)  ## Run the GPU kernels in Triton's interpreter and compile them, without a GPU (minutes)
	@sh scripts/test_gpu_static.sh

test-vllm: $(STAMP)  ## Run checkpoints inside vLLM, in an environment of its own (some 4 GB, long)
	@sh scripts/test_vllm.sh

test-schema: $(STAMP)  ## Send the server what its OpenAPI schema allows and forbids, with schemathesis (own environment)
	@$(BIN)/python benchmarks/robustness.py schema

test-storm: $(STAMP)  ## Attack a server with 200 clients for 10 minutes
	@$(BIN)/python benchmarks/robustness_server.py

lock: $(STAMP)  ## Write requirements.lock anew: the versions and hashes that make venv installs
	@sh scripts/lock.sh

audit: $(STAMP)  ## Ask the advisory database about every locked package (needs the internet)
	@sh scripts/audit.sh

wheel: $(STAMP)  ## Build the wheel twice, compare, install it into an empty environment, list its parts (dist/)
	@sh scripts/build_wheel.sh

fuzz: $(STAMP)  ## Damage files for 10 minutes of processor time, then for 10 more by coverage, with atheris (own environment)
	@$(BIN)/python benchmarks/robustness.py files --minutes 10
	@$(BIN)/python benchmarks/robustness.py coverage --minutes 10

bench-robustness: $(STAMP)  ## Measure extreme numbers and many threads
	@$(BIN)/python benchmarks/robustness.py numerics
	@$(BIN)/python benchmarks/robustness.py threads

bench: $(STAMP)  ## Run every benchmark and write the tables (very long; goes on where it was cut off)
	@$(BIN)/python benchmarks/bench.py

bench-encode: $(STAMP)  ## Measure how fast weights are encoded
	@$(BIN)/python benchmarks/encode.py

bench-kernels: $(STAMP)  ## Measure the kernels beside the memory's bandwidth (into build/kernels.json)
	@$(BIN)/python benchmarks/kernels.py --output build/kernels.json

bench-peers: $(STAMP)  ## The same, with llama.cpp's kernels beside them (fetched and built once)
	@$(BIN)/python benchmarks/kernels.py --peers

# As the command line sets them for itself.
bench-quality bench-twinquant bench-big bench-report: export OMP_WAIT_POLICY = PASSIVE
bench-quality bench-twinquant bench-big bench-report: export THP_MEM_ALLOC_ENABLE = 1

bench-quality: $(STAMP)  ## Measure what each code costs on a real model, off the grid (hours)
	@$(BIN)/python benchmarks/quality.py

bench-twinquant: $(STAMP)  ## Measure what each step of TwinQuant costs on a real model, off the grid (hours)
	@$(BIN)/python benchmarks/twinquant.py

bench-speed: $(STAMP)  ## Measure whole models beside llama.cpp (fetched and built once) and PyTorch, and TwinQuant's operator
	@$(BIN)/python benchmarks/end_to_end.py
	@$(BIN)/python benchmarks/twin_operator.py

bench-big: $(STAMP)  ## Measure memory and time on a synthetic 8B shape (long, and tens of GB of disk)
	@$(BIN)/python benchmarks/big.py

bench-report: $(STAMP)  ## Make the pictures of docs/report.md anew (needs Chromium, as the tests do)
	@sh scripts/browser.sh
	@$(BIN)/python benchmarks/report_pictures.py

tables: $(STAMP)  ## Write the tables and the picture of the docs from benchmarks/results
	@$(BIN)/python benchmarks/tables.py
	@$(BIN)/python benchmarks/pictures.py

clean:  ## Remove .venv, builds and caches (not the fetched models)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
