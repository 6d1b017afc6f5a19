"""What AutoTokenizer must be told for a model type that a transformers without this package does not know."""

import json
from pathlib import Path

from transformers import AutoTokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


def name_tokenizer_class(source: Path, folder: Path) -> None:
    """Write the tokenizer's class into tokenizer_config.json, so that AutoTokenizer need not infer it from the model type."""
    if not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        return
    file = folder / TOKENIZER_CONFIG
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if content.get("tokenizer_class") or "auto_map" in content:
        return
    content["tokenizer_class"] = type(AutoTokenizer.from_pretrained(source, local_files_only=True)).__name__
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
