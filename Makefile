# Two commands do all the set-up: `make demo` and `make test`. Both make .venv when it is missing.
PYTHON ?= python3
VENV := .venv
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: demo check test fuzz gpu sanitize lint bench docs dist release clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# one stamp a set of extras, renewed when the dependencies or the C extension change
$(VENV)/.%: pyproject.toml setup.py $(wildcard ebu_optim/kernels/_cpu*.[ch]) $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

demo: $(VENV)/.examples
	$(BIN)/python examples/quickstart.py --overwrite

# a file stays in one process: its tests share what they launch; a process that dies ends the run with
# the name of its test, since xdist waits for ever for the rest; on a GPU: ARGS="--device cuda"
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 $(ARGS)

# what a change to the optimizer breaks first, in a minute or so; the rest is in `make test`
CORE := tests/optim $(patsubst %,tests/test_%.py,baselines_rules baselines_shape checkpoint_files combine cpu \
	devices files fisher half_precision half_weights kernels kernels_chunked kernels_contract kernels_pieces limits)
check: lint
	$(PYTEST) $(CORE)

test: $(VENV)/.test
	$(PYTEST)

# every launch path of the Triton kernels on random cases, in the interpreter: a quarter of an hour
FUZZ_CASES ?= 2000
FUZZ_SEED ?= 0
fuzz: $(VENV)/.test
	TRITON_INTERPRET=1 FUZZ_CASES=$(FUZZ_CASES) FUZZ_SEED=$(FUZZ_SEED) $(BIN)/pytest tests/interpreted/test_fuzz.py

# all that takes a card, on one; the figures are in gpu.json. Both parts run, whichever fails
gpu: $(VENV)/.test
	failed=0; \
	$(BIN)/python -m pytest --device cuda $(CORE) || failed=1; \
	$(BIN)/python tests/benchmarks/gpu.py --json gpu.json || failed=1; \
	exit $$failed

# the C extension under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own
SANITIZED := build/sanitized
sanitize: $(VENV)/.test
	EBU_OPTIM_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-base build/sanitizing --build-lib $(SANITIZED)
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED):. EBU_OPTIM_TESTED=$(SANITIZED) \
	$(BIN)/pytest --import-mode=append tests/test_cpu.py tests/test_kernels*.py tests/test_combine.py -k "not reference and not chunked"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/pytest tests/benchmarks/test_bench.py
	$(BIN)/python tests/benchmarks/bench_step.py
	$(BIN)/python tests/benchmarks/bench_fisher.py

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# every step of the release workflow that needs no account
release: $(VENV)/.test
	$(BIN)/python .ci/release.py

clean:
	rm -rf build dist docs/_build outputs .pytest_cache .mypy_cache .ruff_cache *.egg-info
