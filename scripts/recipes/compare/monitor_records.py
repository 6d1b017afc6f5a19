"""What `SpectralMonitor` wrote while a run was trained.

By itself: the monitor imports the Trainer's callbacks, which not every comparison should wait for.
"""

import json
from pathlib import Path
from typing import Any

from hf_specattn.diagnostics.monitor import MONITOR_FILE

from .comparison import ComparisonError


def read_records(run: Path) -> list[dict[str, Any]]:
    """Read what `SpectralMonitor` measured in a run.

    Raises:
        ComparisonError: if its file is damaged, or something else.
    """
    file = run / MONITOR_FILE
    try:
        records = json.loads(file.read_text(encoding="utf-8"))["records"]
        return sorted(records, key=lambda record: record["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ComparisonError(
            f"{file} is damaged or not a file of SpectralMonitor: {error!r}. Move it away to continue without it."
        ) from error
