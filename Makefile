# `make demo` and `make test` do everything on a fresh machine; the virtual environment is made when missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-frameworks lint docs fuzz mutants clean

demo: $(INSTALLED)
	$(BIN)/minifisher demo

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile

# Lightning, transformers, accelerate and others, in a virtual environment of their own.
test-frameworks:
	test -x $(VENV)-frameworks/bin/python || $(PYTHON) -m venv $(VENV)-frameworks
	$(VENV)-frameworks/bin/python -m pip install --quiet -c constraints.txt -e '.[fast,frameworks]' pytest hypothesis pyright
	$(VENV)-frameworks/bin/python -m pytest tests/frameworks -rs

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Twenty thousand random networks, options and gradients.
fuzz: $(INSTALLED)
	$(BIN)/python tests/fuzz.py

# Every mutant of a formula against the tests that should notice it; prints the survivors.
mutants: $(INSTALLED)
	$(BIN)/python tests/mutants/run.py

lint: $(INSTALLED)
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt tests/oracles.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs,fast,lab,test]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/oracles.txt
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache runs site
