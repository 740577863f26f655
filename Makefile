# make demo   compares federated with local-only and centralised tuning, on this machine, in about two minutes
# make test   runs the tests
# make lint   checks style, types and which module may import which
# Each sets up .venv first; the second time that is quick.

.PHONY: help demo test lint clean

help:
	@sed -n 's/^# make/make/p' Makefile

demo:
	@scripts/setup.sh run
	@scripts/demo.sh

# One thread per worker: two workers with two threads each would compete for two cores.
test:
	@scripts/setup.sh dev
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n 2 $(ARGS)

lint:
	@scripts/setup.sh dev
	@scripts/lint.sh

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
