# Everything runs in .venv, which the first target that needs it builds from the lock and the others reuse.
#
## make venv    build .venv from the lock, and nothing else
## make demo    draw scenes, train a panoptic model on them, evaluate it, show where the results lie
## make test    the tests that take seconds
## make slow    the tests that take minutes
## make nightly what takes longest: each command of the README, each architecture learnt by heart and exported, …
## make benchmark [PEERS=DIR] [ROWS="1a 2b"]   timings beside other implementations, whose clones lie in DIR
## make benchmark GPU=1   training steps of every architecture on this machine's GPU, taken apart
## make cluster [KEEP=1]   the pipeline on a cluster of two nodes, all on this machine: Ray, MLflow on PostgreSQL, S3
## make check   lint, format and types
## make lock    resolve infra/requirements.lock anew
## make clean   remove .venv, caches and build files (runs and MLflow records stay)
##
## make … BASE_PYTHON=/path/to/python3.12   builds .venv with that Python

VENV := .venv
PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
STAMP := $(VENV)/.stamp
LOCK := infra/requirements.lock
BASE_PYTHON ?= python3 python3.13 python3.12 python3.11

# Ray would otherwise rebuild the environment in every worker when a parent process is `uv run`.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
# pyright would ask the npm registry whether there is a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Every Ray worker imports torch: without byte code that takes two to four times as long.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME VIRTUAL_ENV

.PHONY: help venv demo test slow nightly benchmark cluster check lock clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

venv: $(STAMP)

demo: $(STAMP)
	$(PYTHON) jobs/train.py

# As many processes as cores, up to four: each imports torch, and one of them runs all that need Ray.
# They come first (tests/conftest.py), where xdist would begin with the files of the most tests.
PARALLEL := -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

test: $(STAMP)
	$(PYTHON) -m pytest -m "not slow and not nightly" $(PARALLEL)

# pytest's exit code 5, no test collected, fails here: there are such tests, so something hid them.
slow: $(STAMP)
	$(PYTHON) -m pytest -m "slow and not nightly" $(PARALLEL)

nightly: $(STAMP)
	$(PYTHON) -m pytest -m nightly $(PARALLEL)

benchmark: $(STAMP)
	$(PYTHON) -m $(if $(GPU),tests.benchmarks.gpu,tests.benchmarks $(ROWS) $(if $(PEERS),--peers $(PEERS)))

cluster: $(STAMP)
	$(PYTHON) -m tests.cluster_demo $(if $(KEEP),--keep)

check: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pyright

# `universal`: one lock for Python 3.11 to 3.13 on every platform. It names no registry, so a mirror serves as well.
lock: | $(UV)
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile --quiet pyproject.toml --all-extras --upgrade \
	  --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links -o $(LOCK)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv heeds its own index variable only; a machine whose pip is set to a mirror means that mirror.
$(STAMP): $(LOCK) pyproject.toml | $(UV)
	@set -e; \
	index="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(PYTHON) -m pip config get global.index-url 2>/dev/null || true)}}"; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	echo "Installing $(LOCK) into $(VENV) (the first time this downloads some gigabytes) …"; \
	$(UV) pip sync --quiet --python $(PYTHON) --require-hashes --compile-bytecode $(LOCK); \
	$(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .; \
	touch $@

$(UV): SUITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
$(UV):
	@set -e; found=""; \
	for base in $(BASE_PYTHON); do \
	  if "$$base" -c "$(SUITS)" 2>/dev/null; then found="$$base"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "panoptic-ray needs Python 3.11, 3.12 or 3.13 with the venv module, and none of" \
	    "these is one: $(BASE_PYTHON)." >&2; \
	  echo "Debian, Ubuntu: apt install python3-venv. Elsewhere: make … BASE_PYTHON=/path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$found" --version) …"; \
	"$$found" -m venv --clear $(VENV); \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check \
	  "$$(sed -n 's/^\(uv==[^ ;]*\).*/\1/p' $(LOCK))"
