# Everything runs in a virtual environment of the project's own; PYTHON is what makes it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format docs bench bench-sparsity bench-passes bench-kinds
.PHONY: trt-attributes gpu-check campaign campaign-kill image-models image-lint image-check image-check-arm64 clean

help: ## What can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(READY) ## The virtual environment, with the project and all that it needs

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[host,dev]'
	touch $@

demo: $(READY) ## The whole job on an embedded model; the report is demo_output/digits_fine/report.html
	$(BIN)/eamdeploy run --force models/digits_fine.toml

# A worker for each core, one thread each: a test file stays with one worker, and shares what it has made
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

test: lint ## Linter, type checker and all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

# What exports no model: most of the rules
FAST := artifacts cli convert devices eam engines graph images lint/test_linter.py parity profiling reporting
test-fast: $(READY) ## The tests that export no model
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL) $(addprefix tests/,$(FAST)) tests/test_layering.py

lint: $(READY) ## Linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

format: $(READY) ## The code in the form that the linter wants
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: $(READY) ## docs/reference/commands.md, after a command's options changed
	$(BIN)/python docs/print_commands.py

# Files of every kind, hurt on purpose; CAMPAIGN="--seed 2 --count 1000 -o campaign.json" for others; ten minutes or so
campaign: $(READY) ## 10,000 files that are hurt on purpose
	$(BIN)/python tests/campaign.py $(CAMPAIGN)

# Commands killed at random moments; KILL="--only export --count 20 -o kills.json"; three quarters of an hour or so
campaign-kill: $(READY) ## 200 commands that are killed
	$(BIN)/python tests/campaign_kill.py $(KILL)

# Beside every peer that is installed (pip install '.[bench]' brings OpenVINO and NNCF);
# BENCH="--weights W --data IMAGES --keep build/peers -o peers.json --plot peers.svg", random weights and noise otherwise
bench: $(READY) ## Beside every peer that is installed
	$(BIN)/python benchmarks/peers.py $(BENCH)

bench-sparsity: $(READY) ## Sparsity against speed
	$(BIN)/python benchmarks/sparsity.py

# What each exact rewrite is worth; PASSES="--weights W --data IMAGES -o passes.json" or "--model swin_…", random otherwise
bench-passes: $(READY) ## What each exact rewrite is worth
	$(BIN)/python benchmarks/passes.py $(PASSES)

# Whole maps, ranks 1 to 8 and auto, alone and recovered; KINDS="--weights W --data IMAGES --work build/kinds -o kinds.json"
bench-kinds: $(READY) ## What each kind of frozen head costs and gains
	$(BIN)/python benchmarks/kinds.py $(KINDS)

# 820 MB of downloads; needs CPython 3.10, gcc, nm and readelf
trt-attributes: $(READY) ## The attributes of real TensorRT modules
	$(BIN)/python tests/real_tensorrt.py build/trt-attributes
	$(BIN)/pytest tests/engines/test_trt_attributes.py

# Models of the GPU check, made where torch is; GPU_MODELS="--weights W --data IMAGES" for real ones, random otherwise
build/gpu-check/deit-stock.onnx: | $(READY)
	$(BIN)/python benchmarks/gpu_models.py $(GPU_MODELS) build/gpu-check

# On a machine with a GPU and TensorRT; GPU_PYTHON is a Python that has tensorrt, cuda-python and what a board builds with
GPU_PYTHON ?= $(BIN)/python
gpu-check: build/gpu-check/deit-stock.onnx ## On a machine with a GPU and TensorRT
	$(GPU_PYTHON) benchmarks/gpu_check.py build/gpu-check -o build/gpu-check/result.json

# What the board's image holds; again after the exporter or the checkpoint changed
image-models: $(READY) ## The models in the image, after the exporter or the checkpoint changed
	$(BIN)/eamdeploy export models/digits_deit.eam.safetensors -o models/digits_deit.onnx \
		--baseline models/digits_deit_baseline.onnx --opset 17 --data calib_data/digits/heldout --images 16 --no-measure

image-lint: $(READY) ## The Dockerfile
	$(BIN)/hadolint Dockerfile

# Needs root; installs podman, runc and mmdebstrap by apt where missing
image-check: $(READY) ## The image, built and run
	$(BIN)/python docker/check_image.py amd64

# Under emulation: minutes
image-check-arm64: $(READY) ## … for arm64, emulated
	$(BIN)/python docker/check_image.py arm64

clean: ## Everything that was made is gone
	rm -rf $(VENV) demo_output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
