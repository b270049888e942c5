# make demo   the main job at its smallest: a report of how BF16, FP8 and FP4 diverge
# make rl-demo  the same for reinforcement learning, with a quantized policy
# make test   lint and the tests that are not marked slow
# make test-all  lint and every test; with MINUTES=40, slow ones that begin until then, as CI does
# make tables rebuild the tables and pictures of all pages from results/
# make gpu-test   the tests marked gpu, on a Hopper GPU with the [cuda] extra installed
# make gpu-bench  the kernels against their peers there: results/kernel_bench.jsonl, moe_ffn, few_rows
# make gpu-sanitize  the kernels under NVIDIA's compute-sanitizer: stray accesses, races, barriers
# make setup  only the environment
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo rl-demo test test-all lint tables gpu-test gpu-bench gpu-sanitize
setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m experiments.run --config=configs/demo.py --workdir=runs/demo

rl-demo: setup
	$(BIN)/python -m experiments.rl --config=configs/rl_demo.py --workdir=runs/rl_demo

tables: setup
	$(BIN)/python -m experiments.tables

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two workers, each with whole files: XLA compiles on threads of its own beside them.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(if $(MINUTES),--slow-minutes=$(MINUTES))

# PYTHON_GPU is a Python that sees the GPU; gpu-bench times the kernels beside its torch.
PYTHON_GPU ?= $(BIN)/python
gpu-test:
	$(PYTHON_GPU) -m pytest -m gpu

gpu-bench:
	$(PYTHON_GPU) -m experiments.kernel_bench --only=moe_ffn --out=results/moe_ffn.jsonl
	$(PYTHON_GPU) -m experiments.kernel_bench --only=elementwise,matmul \
	  --out=results/kernel_bench.jsonl
	$(PYTHON_GPU) -m experiments.kernel_bench --only=few_rows --out=results/few_rows.jsonl

# Mosaic's kernels carry mosaic_gpu in their names; XLA's are not instrumented, and NCCL's calls that
# ask for what a device lacks are no errors. One allocation per buffer, so that accesses past a
# buffer's end hit nobody else's memory. Run it alone: beside other programs its process crashed,
# twice, when it compiled the grouped matmuls.
SANITIZER ?= compute-sanitizer
SANITIZER_TOOLS ?= memcheck racecheck synccheck
gpu-sanitize: export XLA_PYTHON_CLIENT_ALLOCATOR = platform
gpu-sanitize: export XLA_FLAGS = --xla_gpu_autotune_level=0
gpu-sanitize:
	for tool in $(SANITIZER_TOOLS); do \
	  $(SANITIZER) --tool $$tool --kernel-name kns=mosaic_gpu --report-api-errors no \
	    --error-exitcode 1 \
	    $(PYTHON_GPU) -m experiments.sanitize $(KERNELS) || exit 1; \
	done
