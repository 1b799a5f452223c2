# make demo    train an ArcFace head on rendered glyphs and write a report (runs/demo)
# make test    lint and all tests that need no GPU, with the share of the package's lines that they run
# make quick   the tests of single functions alone, without those that compile, build or start processes: about a minute
# make test-all  the same as test with the tests that take minutes
# make mutants     plant each of the known mistakes in a copy and see that its tests notice it
# make docs        build the documentation as a site, in site/; docs-serve shows it at http://localhost:8000
# make fuzz N=100000  random problems against the float64 reference, counted in benchmarks/results/fuzz.json
# make kills N=200  kill ranks at random moments of save, step and load; the record is benchmarks/results/kills.json
# make wheel    an sdist, and a manylinux wheel for each CPython that is here, in dist: release/wheels.py
# make wheel-check  install each of them beside the oldest PyTorch and the newest, with no compiler in sight, and test it as quick does
# All others make a virtual environment first, in .venv, with the versions of requirements.lock.

PYTHON ?= python3
space := $(subst ,, )
VENV := .venv
READY := $(VENV)/.ready
# Arguments for the demo, such as ARGS="--head cosface --epochs 4"
ARGS ?=
# More words for pytest under quick and test-gpu
TESTS ?=
# The tests of tests/unit that compile nothing, build nothing and start no process
LONG := compile opcheck interrupt memory_is_what without_the_library break_the_graph
QUICK := tests/unit -n 2 -k "not ($(subst $(space), or ,$(LONG)))" \
    $(foreach f,benchmarks cli demo deprecated docs layers release setup verify,--ignore=tests/unit/test_$(f).py)
# The interpreters that wheels are made for and checked with (all that are supported and here), and the PyTorch that is beside them, such as
# TORCH="--torch torch==2.13.0"
PYTHONS ?=
TORCH ?=
# Where gpu-report writes, and which of its steps it takes (all that fit into nine minutes)
OUT ?= runs/gpu-report
STEPS ?=

# More arguments for mutants, such as MUTANTS="--only margins --jobs 4"
MUTANTS ?=
# How many problems fuzz makes (kills: how many runs it kills, 200), and more arguments for it, such as FUZZ="--backend cpu --seconds 600"
N ?= 100000
FUZZ ?=

CSRC := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)

.PHONY: demo test quick test-all mutants docs docs-serve fuzz kills lint format wheel wheel-check build test-gpu gpu-report clean

demo: $(READY)
	$(VENV)/bin/python -m marginkernels demo $(ARGS)

test: lint
	$(VENV)/bin/python -m pytest -n 2 --cov=marginkernels --cov-report=term:skip-covered

quick: $(READY)
	$(VENV)/bin/python -m pytest $(QUICK) $(TESTS)

test-all: lint
	$(VENV)/bin/python -m pytest -n 2 --slow

mutants: $(READY)
	PYTHONPATH=tests $(VENV)/bin/python -m mutants --record benchmarks/results/mutants.json $(MUTANTS)

docs: $(READY)
	$(VENV)/bin/python -m sphinx -c docs -d build/doctrees -W --keep-going -q . site

docs-serve: docs
	$(VENV)/bin/python -m http.server --directory site

fuzz: $(READY)
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz --cases $(N) --record benchmarks/results/fuzz.json $(FUZZ)

kills: N = 200
kills: $(READY)
	PYTHONPATH=tests $(VENV)/bin/python -W ignore -m helpers.kills --trials $(N) --record benchmarks/results/kills.json

lint: $(READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)
	$(VENV)/bin/python -m mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CSRC)

# The build tools are pinned too, so the package is built with them instead of in an environment of its own.
# Installed in place: edits of Python files need nothing, edits of C++ files rebuild here.
$(READY): requirements.lock pyproject.toml $(wildcard setup.py csrc/*.h csrc/*/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable .
	touch $@

wheel:
	$(PYTHON) release/wheels.py build $(PYTHONS)

wheel-check:
	$(PYTHON) release/wheels.py check $(TORCH) $(PYTHONS) -- $(QUICK) $(TESTS)

# The three below use $(PYTHON) as it is, so that they run where there is a GPU, its PyTorch, and no network.
build:
	$(PYTHON) setup.py build_ext --inplace

test-gpu: build
	$(PYTHON) -m pytest -m gpu $(TESTS)

# Builds and tests as steps of its own, so that each survives the failure of another.
gpu-report:
	$(PYTHON) -m benchmarks.gpu_report --out $(OUT) $(if $(STEPS),--steps $(STEPS))

clean:
	rm -rf $(VENV) build dist site marginkernels.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
