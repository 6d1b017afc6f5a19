#!/usr/bin/env bash
# Screenshots of the diagnostics page, and of pages of the site that `make docs` built, in headless Chromium, as wide as a
# phone and as a screen: runs/screenshots/*.png, to be looked at. Chromium is the system's (`apt-get install chromium`).
#
#   VENV=path/to/venv .ci/screenshots.sh [page of the site, such as evidence ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

browser="${CHROMIUM:-chromium}"
command -v "$browser" >/dev/null || {
    echo "error: $browser is not installed: apt-get install chromium, or name another in CHROMIUM." >&2
    exit 1
}
bin="${VENV:-.venv}/bin"
folder="$PWD/runs/screenshots"
mkdir -p "$folder"

shoot() { # name, address, height, more flags
    for width in 390 1400; do
        "$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size="$width,$3" \
            --screenshot="$folder/$1-$width.png" "${@:4}" "$2" >/dev/null 2>&1
    done
}

"$bin/python" - "$folder/model" <<'PYTHON'
import sys

from transformers import ViTConfig, ViTModel

from hf_specattn import SpectralConfig, condition

sizes = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 192}
model = ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes))
condition(model, SpectralConfig("svd"))
model.save_pretrained(sys.argv[1])
PYTHON
"$bin/specattn" report "$folder/model" --output-dir "$folder/report" --queries 4
shoot report "file://$folder/report/report.html" 3400
shoot report-dark "file://$folder/report/report.html" 3400 --blink-settings=preferredColorScheme=0

for page in "$@"; do
    shoot "$page" "file://$PWD/runs/site/$page.html" 2600
done
echo "Written: $folder/*.png"
