# Two commands for newcomers: `make demo` and `make test`. Every target sets up what it needs, once.
# Everything runs as `python -m`, because console scripts break in paths with spaces.

PYTHON ?= python3
PY := .venv/bin/python
# What is imported is compiled then: all of torch, transformers and Ray takes a minute.
INSTALL := $(PY) -m pip --quiet --disable-pip-version-check install --no-compile

# mypy finds the package through a link named herdgraph, so that the checkout may have any name.
PACKAGES := model export runtimes calibration cli
TYPED := $(addprefix .editable/herdgraph/,$(PACKAGES) $(wildcard *.py))

.PHONY: demo gpu-check test test-slow test-packaging test-lowest test-clients test-native test-cuda fuzz coverage docs lint wheels clean

demo: .venv/.demo
	$(PY) examples/demo.py

# Two workers with one thread each; a file's tests stay together, and conftest.py puts the longest files first.
test: export PYTHONDONTWRITEBYTECODE =
test: .venv/.dev .venv/.native
	$(PY) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder --durations=15

test-slow: .venv/.dev
	HYPOTHESIS_PROFILE=nightly $(PY) -m pytest -m slow

# Damaged inputs with new seeds for an hour, then atheris for five minutes on every reader of bytes.
fuzz: .venv/.dev
	$(INSTALL) "atheris>=3,<4"
	cd tests && PYTHONPATH=.:.. ../$(PY) -m fuzz.harness --first $$(date +%s)
	cd tests && for reader in safetensors gguf image rows tar json; do \
		PYTHONPATH=.:.. ../$(PY) -m fuzz.coverage_guided $$reader || exit 1; done

# On a machine with an NVIDIA GPU: nine minutes, results in .cache/gpu-check (docs/hardware.md). In an environment of its
# own, because onnxruntime and onnxruntime-gpu overwrite each other.
gpu-check: .cache/gpu-venv/.ready
	.cache/gpu-venv/bin/python tools/gpu_check.py

coverage: .venv/.dev
	$(PY) -m pytest -m "not slow" --cov=herdgraph --cov-report=term:skip-covered

docs: .venv/.docs
	@mkdir -p .cache/site-source/herdgraph
	@cd .cache/site-source/herdgraph && ln -sfn $(addprefix ../../../,$(PACKAGES) $(wildcard *.py)) .
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "open .cache/site/index.html"

# The wheel in fresh environments, every verb on every extra; prints the table.
test-packaging: .venv/.dev
	$(PY) -m pytest tests/packaging -m slow -s

# Every verb with the oldest releases that pyproject.toml admits: two environments with torch, some minutes and PyPI, so
# not in `.ci/run`. `make test` has the newest.
test-lowest: .venv/.dev
	$(PY) -m pytest tests/packaging/test_extras.py -m slow -k lowest -s

# Other people's clients against the server, and a fuzzer that knows its interface; many packages.
test-clients: .venv/.dev
	$(INSTALL) -e ".[clients]"
	$(PY) -m pytest tests/runtimes/server/test_other_clients.py tests/runtimes/evaluation/test_lm_eval_model.py -m slow

# The operators on every unit that runs here, and their kernels under sanitizers and on emulated processors; what needs
# a tool that is missing (qemu-user-static, clang-19) is skipped and says so.
test-native: .venv/.dev .venv/.native
	$(PY) -m pytest tests/runtimes/native -m "slow or not slow" -rs

# The target `cuda` on a device that computes nothing (docs/hollow-device.md): gcc and a wheel of 256 MB, no GPU. Skipped, with a
# reason, where either is missing.
test-cuda: .venv/.dev .venv-cuda/.done
	$(PY) -m pytest tests/cuda -m "slow or not slow" -rs

# Wheels for every target, and one for any machine, into dist/.
wheels: .venv/.dev
	$(PY) tools/wheels.py

lint: .venv/.dev
	$(PY) -m ruff check .
	@mkdir -p .editable && ln -sfn .. .editable/herdgraph
	MYPYPATH=.editable $(PY) -m mypy $(TYPED)

clean:
	rm -rf .venv .venv-cuda runtimes/native/lib .cache .editable .coverage htmlcov build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch first and pinned: the newest build that a range admits may bring gigabytes of CUDA packages.
.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "herdgraph needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/.torch: | .venv/bin/python
	$(INSTALL) torch==2.13.0
	@touch $@

.venv/.demo: pyproject.toml | .venv/.torch
	$(INSTALL) -e ".[cpu,build]"
	@touch $@

.venv/.dev: pyproject.toml | .venv/.torch
	$(INSTALL) -e ".[cpu,build,train,serve,video,cluster,otel,tensorrt-rtx,test,dev]"
	@touch $@ .venv/.demo

# The native operators, again when their sources change; without them bundles run on the runtime's own.
.venv/.native: runtimes/native/compile.py $(wildcard runtimes/native/src/*) | .venv/.dev
	-$(PY) -m herdgraph.runtimes.native.compile && touch $@

# onnxruntime-gpu overwrites onnxruntime. Pinned: the tests name kernels, which change with every release.
.venv-cuda/.done:
	$(PYTHON) -m venv .venv-cuda
	-.venv-cuda/bin/python -m pip --quiet --disable-pip-version-check install --no-compile onnxruntime-gpu==1.31.1 \
		"nvidia-cuda-runtime>=13,<14" "nvidia-cuda-crt>=13,<14" -e . && touch $@

.cache/gpu-venv/.ready: pyproject.toml
	$(PYTHON) -m venv .cache/gpu-venv
	.cache/gpu-venv/bin/python -m pip --quiet --disable-pip-version-check install --no-compile -e ".[gpu,build]"
	@touch $@

.venv/.docs: pyproject.toml | .venv/.torch
	$(INSTALL) -e ".[cpu,build,train,docs]"
	@touch $@
