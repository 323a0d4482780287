"""A cache that is not the user's."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What references made of windows goes to the test's own folder."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
