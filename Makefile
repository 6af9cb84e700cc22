# Every target sets up what it needs: on a machine with Python, make and a network, `make serve` and `make test` are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=

.PHONY: help install serve test check format shakespeare train-default bench bench-peers bench-gpu clean

help:
	@echo "make serve [MODEL=path] [ARGS='--port 8000']   start the server"
	@echo "make test [ARGS='-k name']                     run all tests"
	@echo "make check                                     lint, format, types"
	@echo "make shakespeare DATA=dir                      train a first small model and sample from it"
	@echo "make bench                                     measure; last line is one JSON object"
	@echo "make bench-peers                               measure beside other implementations, llama.cpp built for it"
	@echo "make bench-gpu                                 measure a CUDA card, of a checkout with sostenuto[cuda] installed"

$(BIN)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Sostenuto needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

install: $(BIN)/.installed

serve: install
	$(BIN)/sostenuto serve $(MODEL) $(ARGS)

test: install
	@deploy/ensure_services.sh redis-server prometheus curl
	$(BIN)/python -m pytest $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A first model, from text to sample; DATA holds text/tinyshakespeare.txt.gz. Interrupted, it goes on where it stopped.
shakespeare: install
	$(BIN)/python -m training train --config training/examples/tinyshakespeare.toml --run runs/shakespeare --data $(DATA) $(ARGS)
	$(BIN)/python -m training export --run runs/shakespeare --to runs/shakespeare/model
	$(BIN)/python -m training generate --model runs/shakespeare/model --prompt "ROMEO:" --max-tokens 300

train-default: install
	$(BIN)/python -m training train --config models/default/train.toml --run runs/default --data $(DATA)
	$(BIN)/python -m training export --run runs/default --to runs/default/model

bench: install
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-peers: install
	$(BIN)/python -m tests.benchmarks.peers.compare --llama-cpp $(ARGS)

bench-gpu: install
	$(BIN)/python -m tests.benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
