# make demo, make test, make docs: each sets up what it needs.

PYTHON ?= python3
BIN := .venv/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

# two torch processes that each use every core slow each other down tenfold
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: demo test nightly portability lint wheel docs clean

demo: .venv/installed
	@echo "== training a certified network on scikit-learn's handwritten digits (about a minute)"
	$(BIN)/python train.py experiment=digits output=runs/demo overwrite=true
	@echo "== certifying it on the test images"
	$(BIN)/python certify.py ckpt=runs/demo/checkpoints/best.ckpt

test: .venv/installed lint
	@echo "== the test suite"
	$(TEST) -m "not slow"

nightly: .venv/installed lint
	$(TEST)

# the tests that compute, in the arithmetic of other processors; the rest is about files, commands and plots
NOT_NUMERICAL := data tabular uci front docs notebooks benchmarks compare training resume recipes \
  trust_data trust_training trust_commands manual extras
NUMERICAL := tests -m "not slow" -q $(NOT_NUMERICAL:%=--ignore=tests/test_%.py)

portability: .venv/installed
	@for instructions in default avx2 avx512; do for threads in 1 2; do \
	  echo "== ATEN_CPU_CAPABILITY=$$instructions, threads: $$threads"; \
	  ATEN_CPU_CAPABILITY=$$instructions OMP_NUM_THREADS=$$threads \
	    $(BIN)/python -m pytest -n $$((($(JOBS) + $$threads - 1) / $$threads)) $(NUMERICAL) || exit 1; done; done
	@echo "== MKL and oneDNN held to AVX2"
	MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n $(JOBS) $(NUMERICAL)

lint: .venv/installed
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy liplayers benchmarks docs train.py certify.py

wheel: .venv/installed
	@echo "== the wheel"
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

docs: .venv/installed-docs
	@echo "== the manual"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

.venv/installed: pyproject.toml
	@echo "== making .venv and installing liplayers with its dependencies (torch is large: some minutes)"
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'liplayers needs Python 3.11 or newer: make PYTHON=python3.12')"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@

clean:
	rm -rf .venv runs build dist
