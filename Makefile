# make quickstart   set up, train a small network on real images, fuse it, verify it, export it, show the result
# make test         set up, lint, run the tests         (PADDLE=2.6.2 for another Paddle, in a venv of its own)
# make visualdl     open the training logs of the quick start in VisualDL
# make lock         refresh requirements.txt and requirements-gpu.txt from pyproject.toml
PYTHON ?= python3
PADDLE ?= 3.3.1
LOCKED := 3.3.1
LOCKED_GPU := 2.6.2
VENV := .venv$(if $(filter $(LOCKED),$(PADDLE)),,-$(PADDLE))
BIN := $(VENV)/bin

.PHONY: quickstart test lint visualdl lock clean

quickstart: $(VENV)/.ready
	GLOG_minloglevel=2 $(BIN)/python tools/quickstart.py

# A file a process: Paddle and PaddleClas keep flags, names and registered classes for as long as a process lives.
# As many processes as cores, each with one thread, the longest files first; a file's output appears when it has ended.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
test: lint
	@failed=$$(mktemp); ls -S tests/test_*.py | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I FILE sh -c ' \
		output=$$($(BIN)/python -m pytest -q --no-header -W ignore FILE 2>&1); code=$$?; \
		printf "%s\n%s\n" FILE "$$output"; test $$code -eq 0 || { echo FILE >> '$$failed'; exit 1; }' \
		|| { echo "failed:" $$(cat $$failed); rm $$failed; exit 1; }; rm $$failed

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

visualdl: $(VENV)/.ready
	$(BIN)/visualdl --logdir output --language en --disable-telemetry --port 8040

# --no-deps: the list is complete, and PaddleClas' own pins cannot be met on a current Python.
# -e .: the library itself, found from any folder, and always what is in this one.
$(VENV)/.ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	sed 's/^paddlepaddle==[^ ]*/paddlepaddle==$(PADDLE)/' requirements.txt > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r $(VENV)/requirements.txt -e .
	touch $@

COMPILE = uv pip compile --universal --python-version 3.9 --extra ppcls --extra seg --extra det --extra onnx \
	--extra openvino --extra test --upgrade --no-annotate --no-header --no-emit-index-url pyproject.toml -

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check -q uv
	printf 'paddlepaddle==$(LOCKED)\ndecorator\nastor\n' | PATH=$$PWD/.venv-lock/bin:$$PATH $(COMPILE) -q > requirements.new
	@(echo '# Everything, pinned, for every Python from 3.9 on: pip install --no-deps -r requirements.txt -e .'; \
	 echo '# Compiled from pyproject.toml by `make lock`; do not edit.'; \
	 grep -v "sys_platform == 'never'" requirements.new) > requirements.txt
	sed 's/^paddlepaddle==.*/paddlepaddle-gpu==$(LOCKED_GPU)/; s/requirements.txt/requirements-gpu.txt/' \
		requirements.txt > requirements-gpu.txt
	rm -r requirements.new .venv-lock

clean:
	rm -rf .venv .venv-* *.egg-info build output .pytest_cache .ruff_cache .import_linter_cache
