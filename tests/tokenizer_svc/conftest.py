"""The tokenizers that the tests share: trained once a run."""

import pytest
from hypothesis import settings

from tests.tokenizer_svc.folders import FOLDERS
from tokenizer_svc.tokenizer import load_tokenizer

# Time is measured nowhere here, and a loaded machine is slow.
settings.register_profile("tokenizer_svc", deadline=None)
settings.load_profile("tokenizer_svc")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in FOLDERS.items()}


@pytest.fixture(scope="session")
def tokenizers(folders):
    return {kind: load_tokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="session", params=FOLDERS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer(tokenizers, kind):
    return tokenizers[kind]
