# clpeft: `make demo` and `make test` need nothing but Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
OUT ?= outputs/demo
# where real data lie (laid out as docs/results.md says), and a folder with all-MiniLM-L6-v2
CLPEFT_DATA ?=
MINILM ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(RUN): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(DEV): $(RUN)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

.PHONY: install dev
install: $(RUN) ## make the environment in .venv
dev: $(DEV) ## the environment with what tests and quality checks need

.PHONY: demo
demo: $(RUN) ## install, compare seven strategies on the generated stream, write the report
	$(BIN)/clpeft -m strategy=independent,cumulative,finetune,ewc,replay,agem,olora seed=0,1 \
		paths.output_dir=$(OUT)
	$(BIN)/clpeft report $(OUT)

# one learning rate instead of half, once and twice the model's
RATE ?=
.PHONY: tune
tune: $(RUN) ## every strategy's sweep on the toy stream's validation data: two hours; a third of it with RATE=1.75e-3
	sed -n 's|^# Use: clpeft.*|$(BIN)/&$(if $(RATE), optimizer.lr=$(RATE))|; s|/# Use: |/|p' \
		conf/experiment/tune/*.yaml | sh -e
	$(BIN)/clpeft report outputs/tune --select validation

REAL = $(if $(MINILM),model.path=$(MINILM)) $(if $(CLPEFT_DATA),paths.data_dir=$(CLPEFT_DATA))
REAL_CLASS = seed=0,1 $(REAL) paths.output_dir=outputs/real-class

.PHONY: real real-class
real: $(RUN) ## eight strategies on real text, half an hour: make real CLPEFT_DATA=<folder> MINILM=<folder>
	$(BIN)/clpeft -m experiment=standard_cl_minilm $(REAL) \
		strategy=independent,finetune,joint,ewc,replay,olora,agem,cumulative \
		paths.output_dir=outputs/real
	$(BIN)/clpeft report outputs/real
real-class: $(RUN) ## every strategy as tuned on real text, class-incremental, three hours; folders as for real
	$(BIN)/clpeft -m experiment=standard_cl_class strategy=independent,cumulative $(REAL_CLASS)
	for preset in $(notdir $(basename $(wildcard conf/experiment/standard_cl_class/*.yaml))); do \
		$(BIN)/clpeft -m experiment=standard_cl_class/$$preset $(REAL_CLASS) || exit 1; \
	done
	$(BIN)/clpeft report outputs/real-class --costs

.PHONY: test test-matrix test-all
test: $(DEV) ## the tests: of the long matrices a sample in which every strategy comes up
	$(BIN)/python -m pytest -n 2 -m "not slow"
test-matrix: $(DEV) ## every strategy with every PEFT method, base and kind of model
	$(BIN)/python -m pytest -n 2 tests/integration/test_combinations.py
test-all: $(DEV) ## all tests, those of the long matrices too
	$(BIN)/python -m pytest -n 2

.PHONY: quality format
quality: $(DEV) ## ruff, mypy and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launch/slurm/*
format: $(DEV) ## let ruff put things in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench bench-peft
bench: $(DEV) ## speed, and what every strategy costs; CLPEFT_DATA=<folder> MINILM=<folder> for all tables
	$(BIN)/python -m benchmarks.speed
	MINILM=$(MINILM) $(BIN)/python -m benchmarks.costs
bench-peft: $(DEV) ## what every PEFT method trains, takes and scores: the table of benchmarks/peft.md
	$(BIN)/python -m benchmarks.peft

.PHONY: wheel
wheel: $(DEV) ## build the wheel
	$(BIN)/python -m build --wheel

.PHONY: clean
clean: ## remove the environment and what was built; results under outputs/ stay
	rm -rf $(VENV) build dist *.egg-info
