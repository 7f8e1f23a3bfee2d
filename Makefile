# make demo: train a language model on the built-in corpus and let it tell a story
# make test: every check there is
# make book: the notebooks as a web site, in docs/build/html
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test setup export format lint lab book check-book clean

setup: $(READY)

# A stamp file makes the second `make` fast; a change of requirements installs again.
$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llm_scratch needs Python 3.11 or newer; choose one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "Compiling the tokenizer engine (half a minute, once)"
	@$(BIN)/python -c 'from llm_scratch import bpe_engine; bpe_engine.compile_all()'
	@touch $@

# TEXT=FILE trains on that UTF-8 text instead of the built-in stories.
demo: $(READY)
	@$(BIN)/llm_scratch demo $(if $(TEXT),--text "$(TEXT)")

test: $(READY) lint
	@$(BIN)/python -m pytest --nbval nbs tests -n 2 --dist loadfile --durations 10

export: $(READY)
	@$(BIN)/nbdev_export
	@$(BIN)/python tests/readme.py README.md

format: $(READY)
	@$(BIN)/ruff format --quiet nbs tests docs conftest.py setup.py
	@$(BIN)/nbdev_clean

lint: $(READY)
	@$(BIN)/ruff check --quiet nbs tests docs conftest.py setup.py
	@$(BIN)/ruff format --check --quiet nbs tests docs conftest.py setup.py || { echo "run: make format"; exit 1; }

lab: $(READY)
	@$(BIN)/jupyter lab nbs/index.ipynb

# The book needs neither torch nor the package itself: pages are made from notebooks and from source.
$(VENV)/.book: settings.ini constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Sphinx into $(VENV) (half a minute, once)"
	@$(BIN)/python -c 'from configparser import ConfigParser as C; c = C(delimiters="="); \
	  c.read("settings.ini", encoding="utf-8"); print(c["DEFAULT"]["book_requirements"])' | \
	  xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt || \
	  { echo "make book needs the packages of book_requirements in settings.ini, from PyPI: is there a network?"; exit 2; }
	@touch $@

# Nothing is executed: the pages show the outputs that are stored in the notebooks. Any warning is an error.
book: $(VENV)/.book
	@$(BIN)/python docs/prepare.py docs/build/source
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html -c docs docs/build/source docs/build/html
	@echo "The book: docs/build/html/index.html"

# Opens every page in a browser: no error, no request to another machine, no link into the void.
check-book: book
	@$(BIN)/python docs/check.py docs/build/html

clean:
	rm -rf runs build docs/build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
