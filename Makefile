# `make demo` and `make test` do everything for a newcomer; each sets up what it needs in .venv first.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARITY := .venv-parity
# Files of tests go to as many processes as there are cores; within a file the models that it builds are shared.
SHARED_OUT := -n auto --maxprocesses 8 --dist loadfile
EXTRAS := lmms-eval,lm-eval,embedders,report,training,attack,audio,booster,proxy,speech,dev

.PHONY: demo demo-sounds test test-slow lint coverage results sounds smoothing bench parity testsets clean

demo: $(INSTALLED)
	$(BIN)/smoothguard demo

# The same of sounds, with players.
demo-sounds: $(INSTALLED)
	$(BIN)/smoothguard demo --model tiny-audio

test: lint
	$(BIN)/python -m pytest $(SHARED_OUT)

test-slow: lint
	$(BIN)/python -m pytest $(SHARED_OUT) -m "slow or not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Makes every result file that is missing under benchmarks/results, then the README's tables from all of them.
results: $(INSTALLED)
	$(BIN)/smoothguard results
	test -e benchmarks/results/precision.json || $(BIN)/python benchmarks/precision.py
	$(BIN)/smoothguard sweep --preset readme --out benchmarks/results --cache runs/results/cache
	$(BIN)/python benchmarks/sweep_pages.py
	$(BIN)/python benchmarks/smoothing_pages.py
	$(BIN)/python benchmarks/readme_tables.py

# The tables of docs/sounds.md, and the README's: two hours on two cores, where none of their result files are there.
sounds: $(INSTALLED)
	$(BIN)/smoothguard sweep --preset audio --out benchmarks/results --cache runs/results/cache
	$(BIN)/smoothguard results --sounds
	test -e benchmarks/results/sound_cost.json || $(BIN)/python benchmarks/sound_cost.py
	$(BIN)/python benchmarks/sound_pages.py
	$(BIN)/python benchmarks/readme_tables.py

# The table of feature smoothing, its certificates and their curves: hours on two cores, where none of its result files are there.
smoothing: $(INSTALLED)
	$(BIN)/smoothguard results --smoothing
	$(BIN)/python benchmarks/smoothing_pages.py
	$(BIN)/python benchmarks/readme_tables.py

# What a defended answer costs on this machine, about ten minutes on two cores; leave the machine alone meanwhile.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/smoothing_cost.py
	$(BIN)/python benchmarks/readme_tables.py

# Our attacks beside those of two libraries, in an environment of its own (torchattacks pins an old requests); forty minutes on
# two cores, and the times are worth something only if the machine is left alone.
parity: $(PARITY)/.installed $(INSTALLED)
	$(PARITY)/bin/python -m pytest -q tests/test_parity.py
	$(PARITY)/bin/python benchmarks/parity.py
	$(BIN)/python benchmarks/readme_tables.py

# What becomes of every multimodal type of the transformers at hand: docs/coverage.md, 20 minutes on two cores.
coverage: $(INSTALLED)
	$(BIN)/python benchmarks/coverage_table.py

testsets: $(INSTALLED)
	$(BIN)/python -m lmms_smoothguard.tiny.testsets tasks/shapes/data

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

$(PARITY)/.installed: pyproject.toml benchmarks/parity-constraints.txt $(INSTALLED)
	test -x $(PARITY)/bin/python || $(BIN)/python -m venv $(PARITY)
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(PARITY)/bin/python -c benchmarks/parity-constraints.txt \
		-e ".[report]" adversarial-robustness-toolbox torchattacks pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(PARITY) build dist runs *.egg-info
