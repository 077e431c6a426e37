from __future__ import annotations

from pathlib import Path

import pytest
from link_fakes import enrol


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "authority"


@pytest.fixture
def identity(home) -> Path:
    return enrol(home)
