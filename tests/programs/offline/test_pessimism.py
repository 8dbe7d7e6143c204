"""Pessimism against the reference's predictions, mode by mode, and the facts that hold whatever the numbers."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel.programs.offline.modes import MODES
from purejax_bilevel.programs.offline.pessimism import Imagined, coefficients, pessimise

FOLDER = Path(os.environ.get("PUREJAX_BILEVEL_REFERENCE_DATA", Path(__file__).parents[2] / "data" / "offline"))
FILES = sorted(FOLDER.rglob("offline_predictions*.npz")) or sorted(
    (Path(__file__).parents[2] / "data" / "offline").glob("offline_predictions*.npz")
)
REFERENCE_MODES = (
    "aleatoric-penalty",
    "epistemic-penalty",
    "aleatoric-partitioning",
    "epistemic-partitioning",
    "survival",
    "underestimation",
    "offline-exploration-penalty",
    "offline-exploration-partitioning",
)
BATCH, OBS = 50, 3


def columns(prediction: Imagined) -> jax.Array:
    """As the reference has it: next observation, reward, done."""
    ends = jnp.stack([prediction.reward, prediction.terminated.astype(prediction.reward.dtype)], 1)
    return jnp.concatenate([prediction.next_obs, ends], 1)


def predictions(golden: dict[str, np.ndarray], tag: str, network: int) -> Imagined:
    """What one network of a file says; the mean reward of all is that without a penalty."""
    of_all = golden[f"{tag}/mode_none"]
    penalised = next(golden[name] for name in golden if name.startswith(f"{tag}/net") and "c-penalty" in name)
    assert golden["lambda"][0] == 0
    return Imagined(
        next_obs=jnp.asarray(of_all[network, :, :-2]),
        reward=jnp.asarray(of_all[network, :, -2]),
        terminated=jnp.asarray(of_all[network, :, -1] > 0),
        mean_reward=jnp.asarray(penalised[0, :, -2]),
        lowest_reward=jnp.asarray(of_all[:, :, -2].min(0)),
        is_used=jnp.ones(of_all.shape[1], bool),
    )


def settings(golden: dict[str, np.ndarray], tag: str, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and thresholds of a mode's predictions, in arrays of the leading shape of these."""
    coefficient, thresholds = golden["lambda"], golden[f"{tag}/tau_{'al' if mode.startswith('aleatoric') else 'ep'}"]
    if mode.endswith("exploration-partitioning"):
        return golden[f"{tag}/exploration_lower_upper"][0], golden[f"{tag}/exploration_lower_upper"][1]
    if mode.endswith("exploration-penalty"):
        return coefficient[:, None], thresholds[None]
    if mode.endswith("c-penalty"):
        return coefficient, np.inf
    return (np.zeros(()), np.zeros(())) if mode == "underestimation" else (0.0, thresholds)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference_predictions(path: Path, float64: Any):
    golden, checked = dict(np.load(path)), 0
    for name, expected in golden.items():
        tag, *rest = name.split("/")
        if len(rest) != 2 or not rest[0].startswith("net") or tag == "deterministic":
            continue
        mode, uncertainty = rest[1], golden[f"{tag}/u_{'al' if rest[1].startswith('aleatoric') else 'ep'}"]
        prediction = predictions(golden, tag, int(rest[0][3:]))
        first, second = np.broadcast_arrays(*settings(golden, tag, mode))
        for place in np.ndindex(first.shape):
            own = pessimise(prediction, uncertainty, mode, first[place], second[place], float(golden["config/R_max"]))
            np.testing.assert_allclose(columns(own), expected[place], rtol=1e-12, atol=1e-12, err_msg=name)
            checked += 1
    assert checked >= len(REFERENCE_MODES)


def test_reference_messages():
    for path in FILES:
        golden = dict(np.load(path))
        wrong = str(golden["errors/mode"][0])
        with pytest.raises(ValueError, match=rf"--mode must be one of .*, got '{wrong}'"):
            pessimise(drawn(), jnp.zeros(BATCH), wrong, 0.0, 0.0, 1.0)


def test_every_mode_of_the_reference_is_there():
    assert set(REFERENCE_MODES) < set(MODES)


# --- facts ------------------------------------------------------------------------------------------------------------


def drawn() -> Imagined:
    random = np.random.default_rng(0)
    reward = random.standard_normal((4, BATCH))
    return Imagined(
        next_obs=jnp.asarray(random.standard_normal((BATCH, OBS))),
        reward=jnp.asarray(reward[0]),
        terminated=jnp.asarray(random.random(BATCH) < 0.2),
        mean_reward=jnp.asarray(reward.mean(0)),
        lowest_reward=jnp.asarray(reward.min(0)),
        is_used=jnp.ones(BATCH, bool),
    )


UNCERTAINTY = jnp.linspace(0.0, 2.0, BATCH)


def same(own: Imagined, other: Imagined, rows: Any = slice(None)) -> None:
    for mine, others in zip(own, other, strict=True):
        np.testing.assert_array_equal(mine[rows], others[rows])


@pytest.mark.parametrize("mode", ["aleatoric-partitioning", "epistemic-partitioning", "morel"])
def test_partitioning_halts_beyond_the_threshold_alone(mode: str):
    prediction, beyond = drawn(), np.asarray(UNCERTAINTY > 0.7)
    halted = pessimise(prediction, UNCERTAINTY, mode, 0.0, 0.7, 5.0)
    assert (np.asarray(halted.reward)[beyond] == -5.0).all()
    assert np.asarray(halted.terminated)[beyond].all()
    same(halted, prediction, ~beyond)
    same(pessimise(prediction, UNCERTAINTY, mode, 0.0, np.inf, 5.0), prediction)
    assert np.asarray(pessimise(prediction, UNCERTAINTY, mode, 0.0, -1.0, 5.0).terminated).all()


def test_penalties_are_lambda_times_the_uncertainty():
    prediction = drawn()
    for mode, reward in (("epistemic-penalty", prediction.mean_reward), ("mopo", prediction.reward)):
        own = pessimise(prediction, UNCERTAINTY, mode, 0.5, 0.0, 1.0)
        np.testing.assert_allclose(own.reward, reward - 0.5 * UNCERTAINTY, rtol=1e-6)
        same(own._replace(reward=reward), prediction._replace(reward=reward))


def test_survival_and_exploration_rewards():
    prediction, beyond = drawn(), np.asarray(UNCERTAINTY > 0.7)
    alive = pessimise(prediction, UNCERTAINTY, "survival", 0.0, 0.7, 1.0)
    np.testing.assert_array_equal(alive.reward, np.where(beyond, 0.0, 1.0))
    np.testing.assert_array_equal(alive.terminated, beyond | np.asarray(prediction.terminated))
    curious = pessimise(prediction, UNCERTAINTY, "offline-exploration-penalty", 3.0, 0.7, 1.0)
    np.testing.assert_allclose(curious.reward, 3.0 * UNCERTAINTY, rtol=1e-6)
    assert np.asarray(curious.terminated)[beyond].all()


def test_truncation_drops_predictions_and_changes_none():
    prediction = drawn()
    cut = pessimise(prediction, UNCERTAINTY, "truncation", 0.0, 0.7, 1.0)
    np.testing.assert_array_equal(cut.is_used, np.asarray(UNCERTAINTY <= 0.7))
    same(cut._replace(is_used=prediction.is_used), prediction)


def test_coefficients_may_be_traced_and_differ_between_members():
    prediction = drawn()
    many = jax.jit(jax.vmap(lambda own: pessimise(prediction, UNCERTAINTY, "mopo", own, 0.0, 1.0).reward))
    for row, own in zip(many(jnp.array([0.0, 2.0])), (0.0, 2.0), strict=True):
        np.testing.assert_allclose(row, prediction.reward - own * UNCERTAINTY, rtol=1e-6, atol=1e-6)


def test_relative_coefficients_cost_the_largest_reward_at_the_largest_uncertainty():
    pessimism, threshold = coefficients(1.0, 0.5, jnp.float32(16.0), jnp.float32(0.25))
    assert float(pessimism) * 0.25 == 16.0
    assert float(threshold) == 0.125
