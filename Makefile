# Everything from a fresh clone, on a machine with Python and make. PYTHON=python3.12 make test takes another Python.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test portable lint bench study coverage docs docs-check mutants

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/python recipes/medmnist2d.py --config recipes/configs/demo.yaml --output runs/demo

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What must hold whatever instructions of the processor torch uses; both at once with --jobs 2.
portable: portable-default portable-avx2

portable-%: .venv/installed
	ATEN_CPU_CAPABILITY=$* $(BIN)/python -m pytest -m portable tests inmerge_optim --ignore tests/recipes

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell inmerge_optim recipes tests benchmarks examples studies docs *.md
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python benchmarks/merge_cost.py
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/recipe_vs_peers.py

# make study NAME=text_against_code ARGS="--data-dir DIR --checkpoint FILE": docs/studies.md.
study: .venv/installed
	$(BIN)/python studies/run.py $(NAME) $(ARGS)

# The lines and branches that the tests run, of the package and of the recipes.
coverage: .venv/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include "recipes/*" --fail-under 90
	$(BIN)/coverage report --include "inmerge_optim/*" --fail-under 95

# What the tests don't notice of a change in the method; hours on one core (docs/development.md).
mutants: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[mutation]"
	$(BIN)/mutmut run --max-children 2

# The site, in docs/_build/html; a broken link or anchor within it is an error.
docs: .venv/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html

# The commands that README and docs tell: parsed all, and run where they need no network, data or GPU.
docs-check: .venv/installed
	$(BIN)/python docs/commands.py

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --editable ".[docs]"
	touch $@

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable ".[recipes,plot,compact,dicom,dev]"
	touch $@
