# make demo and make test do everything on a fresh machine: environment, pinned dependencies, then the work.
PYTHON ?= python3
# what make bench measures: a recipe whose data is packed
BENCH ?= recipes/demo.yaml
BIN := .venv/bin
READY := .venv/.installed

.PHONY: install demo test test-slow lint bench clean

install: $(READY)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "vitdist needs Python 3.10 or newer; set PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/vitdist data demo data/demo
	$(BIN)/python -m vitdist.data.baseline data/demo
	ACCELERATE_USE_CPU=true $(BIN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  launch/train.py recipes/demo.yaml
	@echo "report: runs/demo/report/index.html"

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/vitdist bench plan
	test -e data/demo/index.json || $(BIN)/vitdist data demo data/demo
	$(BIN)/vitdist bench data $(BENCH) --profile
	$(BIN)/vitdist bench train $(BENCH)

clean:
	rm -rf .venv build *.egg-info
