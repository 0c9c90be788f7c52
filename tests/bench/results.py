"""Figures as JSON, with what they were measured on and how; docs/results holds those that the docs cite."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def save(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes `figures` with device, driver, versions, date and command; without a path nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(origin() | figures, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


def origin() -> dict[str, Any]:
    """Where, when and by which command figures are made."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {spec.name}" if spec else sys.argv[0]
    words = sys.argv[1:]
    if "--output" in words:  # where the figures went says nothing of how they were made
        where = words.index("--output")
        words = words[:where] + words[where + 2 :]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": _driver() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", name, *words]),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
