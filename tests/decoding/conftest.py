"""Backends that a whole session shares; what they remember must change no result."""

import pytest

from specdecode.backends.huggingface import HuggingFaceBackend


@pytest.fixture(scope="session")
def target(target_folder: str) -> HuggingFaceBackend:
    return HuggingFaceBackend(target_folder)


@pytest.fixture(scope="session")
def draft(draft_folder: str) -> HuggingFaceBackend:
    return HuggingFaceBackend(draft_folder)
