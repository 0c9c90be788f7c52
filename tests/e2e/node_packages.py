"""The npm packages of tests/e2e/node, installed as its lock file says."""

import shutil
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parent / "node"

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


def install_packages() -> Path:
    """Installs them if the lock file is newer than what is there; the folder of their commands."""
    installed = NODE / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (NODE / "package-lock.json").stat().st_mtime:
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run(command, cwd=NODE, check=True, capture_output=True, timeout=300)
    return NODE / "node_modules" / ".bin"
