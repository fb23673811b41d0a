# atari_hrvq: every target stands on its own and can be called again.
#   make reproduce   the whole book at the laptop profile (two CPU cores, about 20 minutes)
#   make test        the tests, the smoke chain among them
#   make test-browser  widgets and pages in a headless Chromium: the exported page, the player, JupyterLab
#   make docs        the pages of the book in _docs/, from the finished run $(RUN)
#   make lab         JupyterLab
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    ?= runs/laptop
ARGS   ?=
# waiting OpenMP threads must not spin: another busy program on the same cores would slow torch tenfold
export GOMP_SPINCOUNT ?= 1000

.DEFAULT_GOAL := help
.PHONY: help setup reproduce test test-browser docs lab clean

help:
	@echo 'make reproduce  run every chapter at the laptop profile into $(RUN) and print the claims'
	@echo 'make test       run the tests (ARGS="-k name" to choose)'
	@echo 'make test-browser  run widgets and pages in a headless Chromium; pictures of them in browser/shots/'
	@echo 'make docs       make the pages of the book in _docs/ from the finished run $(RUN) (RUN=runs/smoke and the like)'
	@echo 'make lab        open JupyterLab on the notebooks (ARGS="--no-browser" and the like)'
	@echo 'make clean      remove .venv and caches; runs/ stays'
	@echo 'Each sets up .venv with $(PYTHON) (choose with PYTHON=...) and the pins in constraints.txt.'

setup: $(STAMP)

$(STAMP): constraints.txt setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@test ! -e $(VENV)/.begun || { echo 'an earlier setup did not finish: making $(VENV) anew'; $(PYTHON) -m venv --clear $(VENV); }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $(VENV)/.begun
	@echo 'installing the pins of constraints.txt into $(VENV) (a minute or two)'
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m compileall -q -q -j 0 $(VENV)/lib || true        # on all cores, where pip uses one; a file of some package that is no valid Python is no reason to stop
	@rm $(VENV)/.begun
	@touch $@

reproduce: $(STAMP)
	@$(BIN)/atari-hrvq run --run $(RUN) --profile laptop $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -q tests $(ARGS)

test-browser: $(STAMP)
	@$(BIN)/python browser/chromium.py
	@$(BIN)/atari-hrvq run --run runs/smoke --profile smoke
	@$(BIN)/python -m pytest -q browser $(ARGS)

docs: $(STAMP)
	@$(BIN)/atari-hrvq publish --run $(RUN) $(ARGS)

# long lines of code wrap, and nobody is asked about news; in this environment only
LAB := $(VENV)/share/jupyter/lab/settings

lab: $(STAMP)
	@mkdir -p $(LAB)
	@echo '{"@jupyterlab/notebook-extension:tracker": {"codeCellConfig": {"lineWrap": true}}, "@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' > $(LAB)/overrides.json
	@$(BIN)/python -m jupyterlab nbs/01_frames.ipynb --ServerApp.root_dir=. $(ARGS)

clean:
	rm -rf $(VENV) _proc _docs .pytest_cache .ruff_cache .hypothesis atari_hrvq.egg-info build dist
	find atari_hrvq nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
