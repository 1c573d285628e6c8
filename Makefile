.PHONY: setup demo test test-vllm lint

# Of the demo: code, in the repository, or smollm2, a real chat model that is fetched.
TARGET = code

setup:
	@bash launch/setup.sh

demo: setup
	@.venv/bin/draftsmith demo --target $(TARGET)

# What the many processes of the tests import is compiled once, whatever the environment says.
test: setup
	@PYTHONDONTWRITEBYTECODE= CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv/bin/python -m pytest -q -n 2 --dist worksteal

# The shipped drafters in the real engine (vLLM for the CPU) and one in the speculators library, in an environment of their own; half an hour
# beside other work on two cores.
test-vllm:
	@bash tests/engine/setup.sh
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m tests.engine.speculators_compare
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m tests.engine.vllm_compare

lint: setup
	@.venv/bin/ruff format --check . && .venv/bin/ruff check .
