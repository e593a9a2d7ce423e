# Every target runs in the virtual environment .venv, with the tested versions from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := work_dirs/emoji_demo
TEST := $(BIN)/python -m pytest

.PHONY: install lint test soak gpu demo demo-finetune clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST) -n 2

soak: install
	$(TEST) -m soak --durations=0

gpu: install
	$(TEST) -m gpu

demo: install
	$(BIN)/diffengine train vq_32_emoji --overwrite
	$(BIN)/diffengine train amused_32_emoji --overwrite
	$(BIN)/diffengine convert amused_32_emoji work_dirs/amused_32_emoji/iter_600.pth $(DEMO)/pipeline --pipeline
	$(BIN)/diffengine eval $(DEMO)/pipeline --data amused_32_emoji --split all --guidance 1 -o $(DEMO)
	@echo "how it learnt: work_dirs/amused_32_emoji/report.html"

$(DEMO)/pipeline:
	$(MAKE) demo

demo-finetune: install | $(DEMO)/pipeline
	$(BIN)/diffengine train amused_32_emoji_lora --overwrite
	$(BIN)/diffengine convert work_dirs/amused_32_emoji_lora --pipeline
	$(BIN)/python tools/emoji_finetune.py score amused_32_emoji_lora

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
