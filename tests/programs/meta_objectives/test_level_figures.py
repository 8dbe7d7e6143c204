"""Figures of the levels that GROOVE chooses, from results made by hand."""

from pathlib import Path

import numpy as np
import pytest
import xarray
from PIL import Image

from purejax_bilevel.programs.meta_objectives import figures
from purejax_bilevel.programs.meta_objectives.groove import BEST, QUANTILES
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.dataset import SEED, STEP


def results(kept: int) -> xarray.Dataset:
    """Two seeds; the first one keeps no level with a score."""
    place = np.arange(BEST)
    best = np.stack([np.full(BEST, np.nan), np.where(place < kept, 100.0 + place, np.nan)])
    spread = np.cumsum(np.ones((2, 3, len(QUANTILES))), -1)
    variables = dict.fromkeys(("best_level", "best_score", "best_visits"), ((SEED, "place"), best))
    variables["score_quantile"] = ((SEED, STEP, "quantile"), spread)
    attributes = {"format": datasets.FORMAT, "environment": "GridWorld-debug", "axes": []}
    return xarray.Dataset(variables, {SEED: [0, 1], STEP: [10, 20, 30]}, attributes)


def test_both_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.save(results(kept=2), tmp_path / "results.nc")
    levels, scores = tmp_path / "levels.png", tmp_path / "scores.png"
    assert figures.main([str(tmp_path), str(levels), str(scores), "--member", "1"]) == 0
    with Image.open(levels) as sheet:
        width, height = sheet.size
    assert width > 1.9 * 216 > height / 2  # two pictures side by side
    with Image.open(scores) as picture:
        assert len(picture.convert("RGB").getcolors(100_000)) > 3  # bands upon each other
    for member, sentence in (("0", "keeps no level with a score"), ("2", "--member must be from 0 to 1, got 2")):
        assert figures.main([str(tmp_path), str(levels), str(scores), "--member", member]) == 2
        assert sentence in capsys.readouterr().err


def test_a_run_of_another_agent_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets.save(results(kept=2).drop_vars(["best_level"]), tmp_path / "results.nc")
    assert figures.main([str(tmp_path), "levels.png", "scores.png"]) == 2
    assert "it is none of --agent_type groove" in capsys.readouterr().err
