.PHONY: setup demo test lint

setup:
	@bash launch/setup.sh

demo: setup
	@.venv/bin/draftsmith demo

test: setup
	@CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv/bin/python -m pytest -q

lint: setup
	@.venv/bin/ruff check .
