"""Files that presets need."""

from pathlib import Path

import pytest

from tests.programs.offline import pendulum


@pytest.fixture(scope="session")
def place_of_presets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("presets")
    pendulum.files_of_presets(place)
    return place


@pytest.fixture
def files_of_presets(place_of_presets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the datasets and the ensemble that presets name, as the working directory."""
    monkeypatch.chdir(place_of_presets)
    return place_of_presets
