"""Scripts and benchmarks as modules: they are files outside the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]


def load_script(script: Path) -> ModuleType:
    """Import a file anew as the module of its name, without the suffix."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their types up there
    spec.loader.exec_module(module)
    return module
