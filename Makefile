# Everything runs inside .venv, which each target sets up by itself from the pins in constraints.txt.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-to-develop

.PHONY: demo test check bench clean

demo: $(READY)
	$(RUN) -m shardstep demo

# Two processes at a time: much of a test of several ranks is waiting. Each has ranks of its own.
test: $(DEV)
	$(RUN) -m pytest -q -n 2 --dist worksteal

check: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict shardstep
	$(VENV)/bin/lint-imports

bench: $(READY)
	$(RUN) -m benchmarks

clean:
	rm -rf $(VENV)

# torch goes first and alone: whatever comes later finds it there and draws no other build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	    "shardstep needs Python 3.11 or newer, got %d.%d; say make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(DEV): $(READY)
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
