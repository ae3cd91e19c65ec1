# `make demo` and `make test` need Python >= 3.12 and make, nothing else. uv is used where it is on the PATH.
VENV := .venv
AOT_VENV := .venv-aot
# A candidate counts only when it runs: a version manager's shim can be on the PATH and still refuse.
FIND_PYTHON = for p in "$(PYTHON)" python3.13 python3.12 python3 $(HOME)/.pyenv/versions/*/bin/python3; do \
	  [ -n "$$p" ] && "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo "$$p" && exit 0; \
	done; \
	echo "make: Crescendo needs Python 3.12 or newer and found none; install it, or name it: make PYTHON=/path/to/python3.12 $@" >&2; exit 1
UV := $(shell command -v uv 2>/dev/null)
# $(call install,FOLDER,REQUIREMENTS): puts the pinned set into a virtual environment.
ifneq ($(UV),)
install = $(UV) pip install -q --python $(1)/bin/python -c constraints.txt $(2)
else
install = $(1)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $(2)
endif

.PHONY: help demo test test-aot test-aot-all test-slow chaos test-gpu docs check format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/bin/python $(AOT_VENV)/bin/python:
	@python=$$($(FIND_PYTHON)) && echo "creating $(@D:/bin=) with $$python" && "$$python" -m venv $(@D:/bin=)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Crescendo (about a minute)" && $(call install,$(VENV),-e .) && touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Crescendo and its test tools (about a minute)" && $(call install,$(VENV),-e '.[dev]') && touch $@ $(VENV)/.installed

$(AOT_VENV)/.installed: pyproject.toml constraints.txt | $(AOT_VENV)/bin/python
	@echo "installing the compilers for GPU and TPU (about two minutes)" \
	  && $(call install,$(AOT_VENV),-e '.[dev$(comma)tpu]') \
	  && $(call install,$(AOT_VENV),--no-deps jax-cuda13-plugin jax-cuda13-pjrt jax-triton triton) \
	  && $(call install,$(AOT_VENV),nvidia-cuda-nvcc) && touch $@
comma := ,

demo: $(VENV)/.installed  ## train a small model with constant batches and with batch-size warmup, and compare
	@$(VENV)/bin/python -m crescendo.experiments.papers.batch_warmup

test: $(VENV)/.installed-dev check  ## format, lint, types, and every quick test
	@$(VENV)/bin/pytest -n 2 --dist loadfile -m "not slow and not chaos and not gpu and not aot"

# Triton's interpreter changes Triton for the rest of a process, so what it runs comes last and apart.
test-aot: $(AOT_VENV)/.installed  ## compile training steps and kernels for H100 and TPU, with no device
	@$(AOT_VENV)/bin/pytest -n 2 --dist loadfile -m "aot and not slow" -k "not interpreted and not fit_on_chip"
	@$(AOT_VENV)/bin/pytest -n 2 --dist loadfile -m "aot and not slow" -k "interpreted or fit_on_chip"

test-aot-all: $(AOT_VENV)/.installed  ## the same for every preset, mesh, kernel and kind of device: an hour
	@$(AOT_VENV)/bin/pytest -n 2 --dist loadfile -m aot -k "not interpreted and not fit_on_chip"
	@$(AOT_VENV)/bin/pytest -n 2 --dist loadfile -m aot -k "interpreted or fit_on_chip"

test-slow: $(VENV)/.installed-dev  ## the tests that take minutes
	@$(VENV)/bin/pytest -m "slow and not chaos and not aot" -s

chaos: $(VENV)/.installed-dev  ## kills, signals, full disks, malformed files: real processes, all cores (docs/reliability.md)
	@$(VENV)/bin/pytest -n auto --dist worksteal -m chaos tests/chaos

test-gpu:  ## on a machine with an NVIDIA GPU, in whatever environment holds jax[cuda13]
	@JAX_PLATFORMS=cuda,cpu pytest -n 4 -m gpu tests/gpu

docs: $(VENV)/.installed-dev  ## the documentation, into build/docs, every warning an error
	@$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs build/docs && echo build/docs/index.html

check: $(VENV)/.installed-dev  ## format, lint and types
	@$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

format: $(VENV)/.installed-dev  ## rewrite the files in the project's format
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

clean:  ## remove what make created (runs are kept)
	rm -rf $(VENV) $(AOT_VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
