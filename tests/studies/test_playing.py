"""Episodes of policies that runs leave, in environments where their returns are known; what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from purejax_bilevel import evaluate_policy, render_policy
from purejax_bilevel.errors import UserError
from purejax_bilevel.runtime import artefacts

OBS_DIM = 8  # of the probes


def saved(folder: Path, signs: tuple[int, ...], config: dict[str, Any]) -> str:
    """Two members' Q-functions of one layer: action 1 is better where what is seen, times a sign, is above 0."""
    kernel = np.zeros((len(signs), OBS_DIM, 2), np.float32)
    kernel[:, 0, 1] = signs
    tree = {"q": (({"kernel": kernel, "bias": np.zeros((len(signs), 2), np.float32)},),)}
    artefacts.save(folder, "Q-function", tree, [{"seed": seed} for seed in range(len(signs))], config)
    return str(folder)


@pytest.fixture
def place(tmp_path: Path) -> str:
    return saved(tmp_path / "run", (1, -1), {"env_name": "probe-observation-action"})


def test_returns_are_those_of_the_policy(place: str) -> None:
    np.testing.assert_array_equal(evaluate_policy(place, num_episodes=30), np.ones(30))
    np.testing.assert_array_equal(evaluate_policy(f"{place}#1", num_episodes=7, seed=3), -np.ones(7))
    np.testing.assert_array_equal(evaluate_policy(place, 5, env_name="probe-truncation"), np.full(5, 2.0))


def test_the_seed_is_that_of_the_starts(place: str) -> None:
    first, again, other = (evaluate_policy(place, 40, seed, "probe-observation") for seed in (0, 0, 1))
    assert set(first.tolist()) == {-1.0, 1.0}
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_an_episode_becomes_a_picture(place: str, tmp_path: Path) -> None:
    path = render_policy(place, tmp_path / "new" / "episode.gif", env_name="probe-delay")
    with Image.open(path) as image:
        assert image.n_frames == 2


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        ({}, {}, r"does not say in which environment it acts: give env_name\.$"),
        ({"env_name": "CartPole-v1", "non_stationary": "drift"}, {}, r"was trained with --non_stationary drift: give"),
        ({"env_name": "CartPole-v1"}, {}, r"observes 8 numbers, got \[1, 4\]"),
        ({"env_name": "probe-action-continuous"}, {}, "gives discrete actions, .* needs continuous actions of size 1"),
        ({"env_name": "Nowhere"}, {}, "--env_name Nowhere is not an environment"),
        ({"env_name": "probe-action"}, {"num_episodes": 0}, "num_episodes must be a whole number from 1 to"),
        ({"env_name": "probe-action"}, {"seed": -1}, "seed must be a whole number from 0 to"),
    ],
)
def test_what_cannot_be_played_is_refused(
    config: dict[str, Any], arguments: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        evaluate_policy(saved(tmp_path, (1,), config), **arguments)
