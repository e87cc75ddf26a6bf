# Two commands: `make demo` runs the whole loop and serves the workbench, `make test` runs every test.
PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
export FIFTYONE_DO_NOT_TRACK = true
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: demo up test constraints
demo: $(VENV)/.installed
	$(VENV)/bin/workbench demo $(DEMO_ARGS)

up: $(VENV)/.installed
	$(VENV)/bin/workbench up

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(TEST_ARGS)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" || { echo "Install the package python3-venv first"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt uv
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --constraint constraints.txt --editable ".[test]"
	@touch $@

# Pins what is installed now; run it after a dependency was changed and tested.
constraints: $(VENV)/.installed
	$(VENV)/bin/uv pip freeze --python $(VENV)/bin/python --exclude-editable | grep == | sort -f > constraints.txt
