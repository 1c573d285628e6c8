#!/usr/bin/env bash
# Makes .venv beside pyproject.toml and installs draftsmith in it. Safe to run again: nothing happens while pyproject.toml is unchanged.
#   PY=python3.12 bash launch/setup.sh                another interpreter (3.10 or newer)
#   TORCH_INDEX_URL=... bash launch/setup.sh          the package index that torch is taken from (for instance one with CPU builds)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-python3}
stamp=$(cat pyproject.toml launch/setup.sh | cksum)
if [ -f .venv/.draftsmith ] && [ "$(cat .venv/.draftsmith)" = "$stamp" ]; then exit 0; fi
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $PY is $("$PY" --version 2>&1), expected Python 3.10 or newer" >&2; exit 2; }
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  options=(--clear)
  if "$PY" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then options+=(--system-site-packages); fi  # keeps a GPU build of torch
  "$PY" -m venv "${options[@]}" .venv || { echo "error: $PY cannot make a virtual environment; install its venv package" >&2; exit 2; }
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check -q)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "installing torch"
  index=(${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"})
  if command -v nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" install 'torch>=2.6' ${index[@]+"${index[@]}"}
  else
    "${pip[@]}" install 'torch==2.13.0' ${index[@]+"${index[@]}"} || "${pip[@]}" install 'torch>=2.6' ${index[@]+"${index[@]}"}
  fi
fi
echo "installing draftsmith and what it needs"
"${pip[@]}" install -e '.[dev]'
echo "$stamp" > .venv/.draftsmith
