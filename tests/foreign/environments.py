"""Environments of their own for programs whose packages are not to meet this project's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def install(folder: Path, requirement: str) -> Path:
    """Makes an environment with `requirement` in it; the folder of its commands."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", requirement], check=True)
    return folder / "bin"
