# Everything runs in a virtual environment of the project's own; PYTHON is what makes it.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: install demo test lint bench bench-sparsity bench-passes trt-attributes gpu-check image-models image-lint
.PHONY: campaign campaign-kill image-check image-check-arm64 clean

install: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[host,dev]'
	touch $@

demo: $(READY)
	$(BIN)/eamdeploy run --force models/digits_deit.toml
	$(BIN)/eamdeploy run --force models/digits_swin.toml

# A worker for each core, one thread each: a test file stays with one worker, and shares what it has made
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files of every kind, hurt on purpose; CAMPAIGN="--seed 2 --count 1000 -o campaign.json" for others; ten minutes or so
campaign: $(READY)
	$(BIN)/python tests/campaign.py $(CAMPAIGN)

# Commands killed at random moments; KILL="--only export --count 20 -o kills.json"; three quarters of an hour or so
campaign-kill: $(READY)
	$(BIN)/python tests/campaign_kill.py $(KILL)

# Beside every peer that is installed (pip install '.[bench]' brings OpenVINO and NNCF);
# BENCH="--weights W --data IMAGES --keep build/peers -o peers.json --plot peers.svg", random weights and noise otherwise
bench: $(READY)
	$(BIN)/python benchmarks/peers.py $(BENCH)

bench-sparsity: $(READY)
	$(BIN)/python benchmarks/sparsity.py

# What each exact rewrite is worth; PASSES="--weights W --data IMAGES -o passes.json" or "--model swin_…", random otherwise
bench-passes: $(READY)
	$(BIN)/python benchmarks/passes.py $(PASSES)

# 820 MB of downloads; needs CPython 3.10, gcc, nm and readelf
trt-attributes: $(READY)
	$(BIN)/python tests/real_tensorrt.py build/trt-attributes
	$(BIN)/pytest tests/engines/test_trt_attributes.py

# Models of the GPU check, made where torch is; GPU_MODELS="--weights W --data IMAGES" for real ones, random otherwise
build/gpu-check/deit-stock.onnx: | $(READY)
	$(BIN)/python benchmarks/gpu_models.py $(GPU_MODELS) build/gpu-check

# On a machine with a GPU and TensorRT; GPU_PYTHON is a Python that has tensorrt, cuda-python and what a board builds with
GPU_PYTHON ?= $(BIN)/python
gpu-check: build/gpu-check/deit-stock.onnx
	$(GPU_PYTHON) benchmarks/gpu_check.py build/gpu-check -o build/gpu-check/result.json

# What the board's image holds; again after the exporter or the checkpoint changed
image-models: $(READY)
	$(BIN)/eamdeploy export models/digits_deit.eam.safetensors -o models/digits_deit.onnx \
		--baseline models/digits_deit_baseline.onnx --opset 17 --data calib_data/digits/heldout --images 16 --no-measure

image-lint: $(READY)
	$(BIN)/hadolint Dockerfile

# Needs root; installs podman, runc and mmdebstrap by apt where missing
image-check: $(READY)
	$(BIN)/python docker/check_image.py amd64

# Under emulation: minutes
image-check-arm64: $(READY)
	$(BIN)/python docker/check_image.py arm64

clean:
	rm -rf $(VENV) demo_output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
