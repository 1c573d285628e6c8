#!/usr/bin/env bash
# Makes .venv beside pyproject.toml and installs draftsmith in it. Safe to run again: nothing happens while pyproject.toml is unchanged.
#   PY=python3.12 bash launch/setup.sh      another interpreter (3.10 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-python3}
stamp=$(cat pyproject.toml launch/setup.sh | sha256sum | cut -d' ' -f1)
if [ -f .venv/.draftsmith ] && [ "$(cat .venv/.draftsmith)" = "$stamp" ]; then exit 0; fi
"$PY" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $PY is $("$PY" --version 2>&1), expected Python 3.10 or newer" >&2; exit 2; }
if [ ! -x .venv/bin/python ]; then
  if "$PY" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    "$PY" -m venv --system-site-packages .venv   # keeps an installed GPU build of torch
  else
    "$PY" -m venv .venv
  fi
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check -q)
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "installing torch"
  if command -v nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" install 'torch>=2.6'
  else
    # A CPU build where the package index or a local wheel offers one; to choose another index set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL.
    "${pip[@]}" install 'torch==2.13.0' || "${pip[@]}" install 'torch>=2.6'
  fi
fi
echo "installing draftsmith and what it needs"
"${pip[@]}" install -e '.[dev]'
echo "$stamp" > .venv/.draftsmith
