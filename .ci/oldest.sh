#!/usr/bin/env bash
# Integration tests on the oldest supported transformers, as an overlay over the project's environment.
#
# transformers 5.17 asks for huggingface_hub < 2, and that for httpx < 1, which the environment has in newer releases or
# not at all: they are installed into the folder .overlay, without dependencies, and put before the environment's packages.
#
#   VENV=path/to/venv .ci/oldest.sh [arguments for pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=5.17.0
python="${VENV:-.venv}/bin/python"
overlay="$PWD/.overlay"
requirements=("transformers==$version" "huggingface_hub<2" "httpx<1" "httpcore<2")
stamp="$overlay/.requirements"

if [[ "$(cat "$stamp" 2>/dev/null)" != "${requirements[*]}" ]]; then
    rm -rf "$overlay"
    "$python" -m pip install --quiet --disable-pip-version-check --target "$overlay" --no-deps "${requirements[@]}"
    echo "${requirements[*]}" >"$stamp"
fi

export PYTHONPATH="$overlay${PYTHONPATH:+:$PYTHONPATH}"
"$python" - "$version" <<'PYTHON'
import sys

import transformers

if transformers.__version__ != sys.argv[1]:
    sys.exit(f"imported transformers {transformers.__version__} from {transformers.__file__}, not {sys.argv[1]}")
print(f"transformers {transformers.__version__} from {transformers.__file__}")
PYTHON

"$python" -m pytest -m integration "$@"
