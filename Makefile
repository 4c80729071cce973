# Everything runs from .venv, which requirements/install.sh builds once and keeps in step with the pins.
SHELL := bash
.DEFAULT_GOAL := demo
MAKEFLAGS += --no-print-directory
bin := .venv/bin
announce = @printf '\n== %s\n'

.PHONY: .venv demo test lint unit integration e2e gpu chaos generated clean

# Phony, because a time stamp cannot tell a whole environment from half of one; the script can, in a moment.
.venv:
	@requirements/install.sh

demo: .venv
	@$(bin)/errata demo

test: lint unit gpu integration e2e

lint: .venv
	$(announce) 'ruff: rules'
	@$(bin)/ruff check
	$(announce) 'ruff: format'
	@$(bin)/ruff format --check
	$(announce) 'mypy: types'
	@$(bin)/mypy
	$(announce) 'import-linter: who may import whom'
	@$(bin)/lint-imports
	$(announce) 'check-jsonschema: docker-compose.yml against the compose specification'
	@$(bin)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(announce) 'hadolint: Dockerfiles'
	@$(bin)/hadolint docker/*.Dockerfile
	$(announce) 'bandit and pip-audit: the code and the pins'
	@$(bin)/python security/audit.py

# Side by side, as most of their time they wait. The tests of a file share servers, so they stay together.
unit integration: .venv
	$(announce) 'pytest: $@'
	@$(bin)/python -m pytest --numprocesses auto --dist loadfile tests/$@

e2e gpu: .venv
	$(announce) 'pytest: $@'
	@$(bin)/python -m pytest tests/$@

# Minutes of faults under traffic; tests/e2e has a short form of it.
chaos: .venv
	@$(bin)/python -m tests.chaos

# Files in the repository that are made from the code: the OpenAPI document and the README's table of settings.
generated: .venv
	@$(bin)/python -m service.generate

clean:
	rm -rf .venv build .errata *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find service worker tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
