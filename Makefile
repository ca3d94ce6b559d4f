# `make` alone lists the targets. Everything runs in .venv, made from requirements/dev.lock.

VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/dev.lock
SOURCES := finetune $(wildcard *.py)
# Tried in this order; a name that exists but is another version (or a version manager's empty shim) is passed over.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.10 python3.12 python3 python)
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
COMPILE := $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --generate-hashes \
	--no-header --no-annotate --quiet $(if $(UPGRADE),--upgrade)
PYTEST_ARGS ?=
# Tests in these folders start no processes that measure time or wait for each other: two of them run at once.
APART := $(addprefix tests/,adapters checkpoints data end_to_end families merge models parallel reference reporting run serving settings storage tokenizers training)

.DEFAULT_GOAL := help
.PHONY: help install demo test parity check format lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

install:  ## create .venv from the lock; does nothing when it is current (PYTHON=... picks the interpreter)
	@if cmp -s $(LOCK) $(VENV)/installed.lock; then \
		$(BIN)/python -m finetune.environment >/dev/null 2>&1 && exit 0; \
		echo "Repairing $(VENV) ..."; \
	else \
		python=; for candidate in $(CANDIDATES); do \
			if $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
			then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "No Python 3.10, 3.11 or 3.12 among: $(CANDIDATES). Install one of them," \
				"or say where it is: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
		fi; \
		echo "Creating $(VENV) with $$($$python --version) ..."; \
		$$python -m venv --clear $(VENV) || exit 1; \
	fi; \
	echo "Installing $(LOCK): about 1.5 GB, a few minutes ..."; \
	$(PIP) install --quiet --progress-bar off --require-hashes -r $(LOCK) && \
	$(BIN)/python -m finetune.environment && cp $(LOCK) $(VENV)/installed.lock && \
	echo "$(VENV) is ready."

demo: install  ## fine-tune a tiny model on data/ and show what it learned
	$(BIN)/python -m finetune.demo

test: install  ## run the test suite (PYTEST_ARGS="-m 'not slow'" for a part of it)
ifeq ($(PYTEST_ARGS),)
	@# Both parts run, so that a failure of the first hides none of the second.
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(APART); first=$$?; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(APART)) tests && exit $$first
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

parity: install  ## install torch, transformers, peft, bitsandbytes and trl into .venv and compare with them live
	@if ! cmp -s requirements/parity.txt $(VENV)/installed-parity.txt; then \
		echo "Installing requirements/parity.txt (nothing of the lock moves) ..."; \
		$(PIP) freeze --exclude torch --exclude transformers --exclude peft --exclude bitsandbytes --exclude trl > $(VENV)/constraints.txt && \
		$(PIP) install --quiet --progress-bar off -c $(VENV)/constraints.txt -r requirements/parity.txt && \
		cp requirements/parity.txt $(VENV)/installed-parity.txt; \
	fi
	@# Their other tests need none of it and run in `make test`.
	FINETUNE_REQUIRE_PARITY=1 $(BIN)/python -m pytest -m parity tests/reference tests/storage/test_torch_files.py $(PYTEST_ARGS)

check: install  ## lint, formatting, types, file length: what CI demands before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)
	@find . -name '*.py' -not -path './.venv/*' -not -path './build/*' -print0 | \
		xargs -0 awk 'NF && $$1 !~ /^#/ { lines[FILENAME]++ } \
			END { for (name in lines) if (lines[name] > 400) { print name ": " lines[name] " lines, 400 allowed"; bad = 1 } \
			exit bad }'

format: install  ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install  ## resolve pyproject.toml into requirements/*.lock (UPGRADE=1 moves pins that still fit)
	$(COMPILE) --extra cpu --extra dev --output-file requirements/dev.lock
	$(COMPILE) --extra cpu --output-file requirements/cpu.lock
	$(COMPILE) --extra cpu --extra chat --output-file requirements/chat.lock
	$(COMPILE) --extra cpu --extra gguf --output-file requirements/gguf.lock
	$(COMPILE) --extra cpu --extra serve --output-file requirements/serve.lock
	$(COMPILE) --output-file requirements/base.lock
	@if grep -nE '://|^-|\+cpu|\+cu[0-9]' requirements/*.lock; then \
		echo "An address or a local build entered the lock." >&2; exit 1; fi

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
