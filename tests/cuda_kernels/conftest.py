"""The host emulator, its libraries built once a session."""

from pathlib import Path

import pytest

from tests.cuda_kernels.emulator.emulator import Emulator


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture
def emulator(emulator_folder: Path) -> Emulator:
    return Emulator(emulator_folder)
