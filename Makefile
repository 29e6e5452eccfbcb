# Everything runs in .venv, which the first target that needs it makes.
#   make demo     train, quantize and report on real digits (under 4 minutes)
#   make test     the tests; make lint
#   make test-long   whole runs and large families, as long again; make stress: long fault and load tests, hours
#   make coverage both, with the lines counted that they run and a floor; a third longer
#   make test-lowest, make test-newest     with the lowest versions of everything, and with the newest that pip offers
#                 (their numbers are then in tests/versions); PYTHON=python3.13 with another Python
#   make gpu      the tests on a GPU, with the torch and lightning of $(PYTHON) (tests/gpu/README.md)
#   make docs     the documentation as a site, in site/
#   make clean    remove what the others made, .venv included
# The development environment uses the versions that the tests ran with; users of the package are not pinned.
#   make test TORCH="torch torchvision"      the newest instead

PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
EXTRAS ?= dev,vision,detection,export
WORKERS ?= 2
RUN = runs/demo

BIN = .venv/bin
STAMP = .venv/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-long coverage test-lowest test-newest stress gpu lint docs clean install

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'installing into .venv: a few minutes, once'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' $(TORCH)
	@touch $@

demo: $(STAMP)
	@rm -rf $(RUN)
	OMP_NUM_THREADS=2 $(BIN)/hawq-lightning name=demo hydra.run.dir=$(RUN) onnx=true
	@echo "open $(RUN)/report.html"

RUN_TESTS = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(RUN_TESTS) -m "not stress and not long"

test-long: $(STAMP)
	$(RUN_TESTS) -m "long and not stress"

coverage: $(STAMP)
	$(RUN_TESTS) -m "not stress" --cov --cov-report=

VERSIONS_lowest = -c tests/versions/lowest.txt
VERSIONS_newest = --upgrade --upgrade-strategy eager
# what others deprecate is no fault of ours in versions that we do not develop with
DEPRECATED = -W ignore::DeprecationWarning -W ignore::FutureWarning -W ignore::PendingDeprecationWarning

test-lowest test-newest: test-%: pyproject.toml
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install -qq --disable-pip-version-check -e '.[$(EXTRAS)]' $(VERSIONS_$*)
	@test $* = lowest || .venv-$*/bin/python -m tests.versions.write newest.txt
	.venv-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not stress" $(DEPRECATED)

stress: $(STAMP)
	$(BIN)/python -m pytest -m stress

gpu:
	PYTHON=$(PYTHON) bash tests/gpu/run.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict
	$(BIN)/python -m pytest -m stress tests/app/test_user_types.py

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q
	@echo "open site/index.html"

.venv/.docs: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-* site build dist *.egg-info runs outputs multirun lightning_logs .pytest_cache .mypy_cache .ruff_cache .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
