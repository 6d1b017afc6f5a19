#!/usr/bin/env bash
# transformers' common model tests on stock BERT, ViT, GPT-2 and Swin and on ours: the same must fail, none as things stand,
# but for what common_models.py says of svd's corrections.
#
# The tests come with the source distribution of the installed transformers, which lacks some files that they import: those
# become empty. It and `parameterized` are installed into the folder .overlay-tests, and nowhere else.
#
#   VENV=path/to/venv .ci/common_models.sh [arguments for pytest, such as -k "Bert and Svd"]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${VENV:-.venv}/bin/python"
version="$("$python" -c 'import transformers; print(transformers.__version__)')"
overlay="$PWD/.overlay-tests"
source="$overlay/transformers-$version"
pip=("$python" -m pip --quiet --disable-pip-version-check)

if [[ ! -f "$source/.ready" ]]; then
    rm -rf "$overlay"
    "${pip[@]}" download --no-deps --no-binary :all: --no-build-isolation --dest "$overlay" "transformers==$version"
    "${pip[@]}" install --no-deps --target "$overlay/extra" parameterized
    tar --extract --gzip --file "$overlay/transformers-$version.tar.gz" --directory "$overlay"
    mkdir -p "$source/tests/exporters" "$source/tests/generation"
    touch "$source/tests/__init__.py" "$source/tests/exporters/__init__.py" "$source/tests/generation/__init__.py"
    echo "class ExportTesterMixin: pass" >"$source/tests/exporters/test_export.py"
    echo "class GenerationTesterMixin: pass" >"$source/tests/generation/test_utils.py"
    echo "def __getattr__(name): return None" >"$source/tests/distributed_testing_utils.py"
    touch "$source/.ready"
fi

export PYTHONPATH="$source:$overlay/extra:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
"$python" -m pytest -c /dev/null --rootdir .ci -p no:cacheprovider "$@" .ci/common_models.py
