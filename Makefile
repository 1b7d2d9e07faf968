# Needs make and Python 3.10 to 3.13, nothing else. `make` alone lists what there is.

# The first of these that fits makes the environment; `make env PYTHON=/path/to/python3.12` names another one.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10
# What `make run` runs: make run ARGS="--epochs 0 --batch_size 0". `python mscnn_helpers.py --help` lists it all.
ARGS ?= --epochs 5 --light_mode
# What the benchmarks get: make bench-speed BENCH="--only training,decide".
BENCH ?=
# FRESH=1 makes the copies that `make lab` opens anew, and keeps the old ones beside them.
FRESH ?=
# SITE_RUN=runs/NAME makes the website of that finished run.
SITE_RUN ?=
# SYSTEM_PYTHON=1 uses the Python on the path as it is and installs nothing: for conda, containers and Colab.
SYSTEM_PYTHON ?=

# ensurepip is asked for because Debian and Ubuntu ship venv without it. The *base* Python is reported, since an
# activated .venv must not be the Python that replaces .venv.
CHECK = import ensurepip, sys, venv; v = sys.version_info[:3]; assert (3, 10) <= v[:2] <= (3, 13); \
  print(sys._base_executable + " %d.%d.%d" % v)
NO_PYTHON = Python 3.10 to 3.13 with its venv module is needed. Tried: $(PYTHON). \
  On Debian or Ubuntu: apt install python3-venv. Another one: make env PYTHON=/path/to/python3.12

ifeq ($(SYSTEM_PYTHON),)
FOUND := $(shell for python in $(PYTHON); do "$$python" -c '$(CHECK)' 2>/dev/null && break; done)
# Written last, so that a half-made environment has none; named by all that the environment depends on.
STAMP := .venv/made-by-python-$(lastword $(FOUND))-from-$(firstword $(shell cksum requirements.lock))
COMMAND := .venv/bin/mscnn
RUN := .venv/bin/python
else
STAMP :=
COMMAND :=
RUN := $(firstword $(PYTHON))
endif

.DEFAULT_GOAL := help
.PHONY: help env run lab test test-notebooks test-slow bench-quality bench-speed bench-ablations bench-selective bench-verifiers bench-ood bench-craft bench-networks lint format lock badges site clean distclean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

env: $(STAMP) $(COMMAND) ## Make .venv from requirements.lock, if it is not there, whole and up to date

$(STAMP):
	@$(if $(FOUND),,$(error $(NO_PYTHON)))
	@echo "Making .venv with Python $(lastword $(FOUND)): about 160 packages, 3.4 GB on disk, once."
	@rm -rf .venv
	@trap 'echo "Interrupted. Nothing is broken: the next make starts .venv afresh." >&2; exit 130' INT TERM; \
	  { $(firstword $(FOUND)) -m venv .venv && \
	    $(RUN) -m pip install --disable-pip-version-check -r requirements.lock && touch $@ && \
	    echo "The environment is ready, in .venv."; } || \
	  { echo "Making .venv failed, see above. The next make starts it afresh." >&2; exit 1; }

# The command runs the code of this folder. Nothing is downloaded: setuptools, which builds it, is in the lock.
.venv/bin/mscnn: $(STAMP) pyproject.toml
	@$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

run: env ## Run the five notebooks in light mode into runs/latest; ARGS="…" for other options
	@$(RUN) mscnn_helpers.py $(ARGS)

lab: env ## Open JupyterLab on copies of the notebooks in runs/lab, which keep your changes; FRESH=1 for new copies
	@$(RUN) -m mscnn_parts.lab $(if $(FRESH),--fresh)
	@$(RUN) -m jupyterlab --LabApp.default_url=/lab/tree/runs/lab/notebooks

test: env ## Run the tests but the slow ones, on two processes: about 5 minutes on two cores
	@$(RUN) -m pytest -n 2 --dist loadfile -m "not slow and not chain"

test-notebooks: env ## Run all notebooks and the solutions of their exercises on a small data set
	@$(RUN) -m pytest -n 2 --dist loadfile -m chain

test-slow: env ## Run the slow tests: about an hour
	@$(RUN) -m pytest -m slow

bench-quality: env ## Measure accuracy, selective metrics, time and memory of full runs: over an hour; BENCH=--quick
	@$(RUN) benchmarks/quality.py $(BENCH)

bench-speed: env ## Measure speed and memory against baselines: about an hour; BENCH=--quick for minutes
	@$(RUN) benchmarks/speed.py $(BENCH)

bench-ablations: env ## Measure what each ablation of the recipe is worth: 45 minutes; BENCH=--quick
	@$(RUN) benchmarks/ablations.py $(BENCH)

bench-selective: env ## Measure our confidence against every baseline's: hours the first time; BENCH=--quick
	@$(RUN) benchmarks/selective.py $(BENCH)

bench-verifiers: env ## Measure which verifier is worth having: over an hour; BENCH=--quick
	@$(RUN) benchmarks/verifiers.py $(BENCH)

bench-ood: env ## Measure what becomes of images that show no category: after bench-quality; BENCH=--quick
	@$(RUN) benchmarks/ood.py $(BENCH)

bench-craft: env ## Measure what notebooks 07 and 08 compare: an hour; BENCH=--quick
	@$(RUN) benchmarks/craft.py $(BENCH)

bench-networks: env ## Measure one of Stage 1's networks: BENCH='--row "MNIST, mnist_bn"'
	@$(RUN) benchmarks/networks.py $(BENCH)

lint: env ## Check style, types, spelling, links, badges, and that notebooks have no outputs; changes nothing
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m basedpyright
	@$(RUN) -m codespell_lib
	@$(RUN) .github/links.py
	@$(RUN) -m nbstripout --verify --keep-id notebooks/*.ipynb
	@$(RUN) .github/badges.py --check
	@if command -v .venv/bin/hadolint > /dev/null; then .venv/bin/hadolint Dockerfile; fi

format: env ## Bring code and notebooks into the shape that `make lint` wants
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@$(RUN) -m nbstripout --keep-id notebooks/*.ipynb

lock: env ## Write requirements.lock anew: the newest versions that requirements.txt and pyproject.toml allow
	@$(RUN) -m uv pip compile --quiet --upgrade --universal --python-version 3.10 --group dev \
	  --custom-compile-command "make lock" --output-file requirements.lock requirements.txt

badges: env ## Write the addresses of repository and website (pyproject.toml) into notebooks and READMEs
	@$(RUN) .github/badges.py

# Without a training in full: two verifiers of the pretrained model are retrained, and 06 to 09 are in light mode.
SITE_MAIN = --load_model pretrained --stage2_only --stage2_categories ship,truck --epochs 0 --batch_size 0 \
  --notebooks 01,02,03,04,05,05b --run_dir runs/site
SITE_MORE = --light_mode --epochs 5 --notebooks 06,07,08,09 --run_dir runs/site

site: env ## Build the website in site/ from the pretrained model: half an hour; SITE_RUN=runs/NAME takes a finished run
	@$(if $(SITE_RUN),,$(RUN) mscnn_helpers.py $(SITE_MAIN) && $(RUN) mscnn_helpers.py $(SITE_MORE))
	@rm -rf site
	@$(RUN) .github/pages.py $(or $(SITE_RUN),runs/site)

clean: ## Remove caches, site/ and runs/, trained models included
	rm -rf runs site build *.egg-info .pytest_cache .ruff_cache
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

distclean: clean ## The same, and .venv
	rm -rf .venv
