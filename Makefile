# `make up` starts a cluster on this machine, `make test` runs every test that needs no GPU.

PYTHON ?= python3
# Where pip looks for torch besides the usual index. On a machine without a GPU,
# TORCH_INDEX=https://download.pytorch.org/whl/cpu spares a few gigabytes of CUDA libraries.
TORCH_INDEX ?=
# More flags for `baton up`, such as ARGS="--decode 2 --port 9000".
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
NODE_STAMP := examples/node/node_modules/.package-lock.json

.PHONY: up test test-gpu lint protos venv test-tools clean

up: $(STAMP)
	@exec $(BIN)/baton up $(ARGS)

test: $(STAMP) test-tools $(NODE_STAMP)
	$(BIN)/pytest

test-gpu: $(STAMP)
	$(BIN)/pytest tests/gpu

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

protos: $(STAMP)
	$(BIN)/python protos/generate.py

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "baton needs Python 3.11 or newer and \`$(PYTHON)\` is not one; try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "\`$(PYTHON)\` has no venv module; install it: sudo apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  -c constraints.txt -e '.[dev]'
	@touch $@

# Programs that tests run beside Python: Redis for the shared index, openssl for TLS to it, Node and curl for the examples.
test-tools:
	@missing=; \
	for tool in redis-server:redis-server node:nodejs npm:npm curl:curl openssl:openssl; do \
	  command -v "$${tool%%:*}" >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing </dev/null; \
	else \
	  echo "the tests also need:$$missing; install them: sudo apt-get install$$missing" >&2; exit 1; \
	fi

$(NODE_STAMP): examples/node/package.json examples/node/package-lock.json | test-tools
	cd examples/node && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/node/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
