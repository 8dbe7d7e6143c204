"""The generator of datasets: what each file holds, from one small run; and the same bytes from the same seed."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import environments, run
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import dataset_files
from purejax_bilevel.programs.offline.collect import KINDS, Config, medium_of
from purejax_bilevel.programs.offline.datasets import Dataset, check_environment

CONFIG = Config(
    num_train_steps=1000,
    init_steps=300,
    eval_frequency=100,
    eval_episodes=2,
    rows=1000,
    collect_envs=2,
    reference_episodes=12,
    hidden_dim=8,
    batch_size=16,
    inner_lr=3e-3,
    medium_score=0.5,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    run(CONFIG, folder=folder, quiet=True, num_seeds=2, devices=1)
    return folder


@pytest.fixture(scope="module")
def collected(place: Path) -> dict[str, Dataset]:
    return {kind: dataset_files.load(str(place / f"{kind}_0.npz")) for kind in KINDS}


def test_every_kind_is_there_with_its_rows(collected: dict[str, Dataset]) -> None:
    medium_after = collected["medium"].about["medium_after"]
    assert medium_after % 100 == 0
    assert medium_after > 300
    for kind, dataset in collected.items():
        assert len(dataset) == (medium_after if kind == "medium-replay" else 1000), kind
        assert dataset.about["kind"] == kind
        check_environment(dataset, "Pendulum-v1", 3, 1, 200)
        assert not dataset.terminated.any()
        assert set(dataset.lengths().tolist()) <= {200, 100}  # two copies of 500 rows: the last episode is cut
        np.testing.assert_array_equal(dataset.timeout, dataset.ends)


def test_rows_are_what_the_environment_does(collected: dict[str, Dataset]) -> None:
    """Angle and velocity of a pendulum give its next ones and the reward."""
    for dataset in collected.values():
        cos, sin, speed = dataset.obs.T.astype(float)
        torque, angle = 2.0 * dataset.action[:, 0], np.arctan2(sin, cos)
        new_speed = np.clip(speed + 0.05 * (15 * np.sin(angle) + 3 * torque), -8, 8)
        new_angle = angle + 0.05 * new_speed
        expected = np.stack([np.cos(new_angle), np.sin(new_angle), new_speed], 1)
        np.testing.assert_allclose(dataset.next_obs, expected, atol=1e-4)
        np.testing.assert_allclose(dataset.reward, -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2), atol=1e-3)


def test_who_acted(collected: dict[str, Dataset]) -> None:
    uniform = collected["random"].action[:, 0]
    assert abs(uniform.mean()) < 0.1
    assert abs(uniform.std() - 3**-0.5) < 0.03
    start = collected["medium-replay"].action[:300, 0]  # of the random start
    assert abs(start.std() - 3**-0.5) < 0.06
    both = collected["medium-expert"]
    for own, kind in ((both.obs[:500], "medium"), (both.obs[500:], "expert")):
        np.testing.assert_array_equal(own, collected[kind].obs[:500])
    assert not np.array_equal(collected["medium"].obs, collected["expert"].obs)


def test_reference_scores_are_in_every_file(collected: dict[str, Dataset], place: Path) -> None:
    scores = [dataset.scores for dataset in collected.values()]
    assert all(one == scores[0] for one in scores)
    if scores[0] is not None:
        assert -1700 < scores[0].minimum < -900
        assert 0 < scores[0].minimum_error < 200
        np.testing.assert_allclose(collected["random"].score(scores[0].minimum), 0.0)
        np.testing.assert_allclose(collected["random"].score(scores[0].maximum), 100.0)
    assert dataset_files.load(str(place / "random_1.npz")).obs[0, 0] != collected["random"].obs[0, 0]


def test_which_policy_is_medium() -> None:
    nan = jnp.nan
    for scores, wanted, expected in (
        ([nan, 0.0, 0.1, 0.4, 1.0], 0.33, 3),
        ([nan, 0.0, 0.3, 0.9, 0.35], 0.33, 2),  # nearer than the first above, and what comes later does not count
        ([nan, -0.2, 0.2, 0.1], 0.9, 2),  # none is good enough: the best
    ):
        assert jax.jit(medium_of)(jnp.array(scores), wanted) == expected


def test_environments_that_terminate_are_seen_to() -> None:
    task = environments.make_continuous("MountainCarContinuous-v0")
    config = Config(env_name="MountainCarContinuous-v0", rows=10, collect_envs=2).resolved()
    program = config.program()
    rows = np.zeros((6, 2 * task.obs_dim + task.action_dim + 2), np.float32)
    rows[:, :2] = np.arange(12).reshape(6, 2)
    rows[:, 2:4] = rows[:, :2] + [4.0, 4.0]  # the next row of the same copy
    rows[2, 2:4], rows[2, -1] = [0.5, 0.1], 1.0
    from purejax_bilevel.programs.offline import collect

    found = collect._dataset(rows, 2, program.task.obs_dim, config.env_name, None, {})
    np.testing.assert_array_equal(found.obs[:, 0], [0, 4, 8, 2, 6, 10])
    np.testing.assert_array_equal(found.terminated, [False, True, False, False, False, False])
    np.testing.assert_array_equal(found.timeout, [False, False, True, False, False, True])
    np.testing.assert_array_equal(found.lengths(), [2, 1, 3])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kinds": "random,best"}, "--kinds must be one or more of random, medium, .*got 'random,best'"),
        ({"num_train_steps": 1500}, "--num_train_steps 1500 must be a multiple of --eval_frequency 1000"),
        ({"env_name": "CartPole-v1"}, "CartPole-v1 has discrete ones"),
        ({"rows": 5}, "--rows 5 is smaller than --collect_envs 10"),
        ({"env_name": "Nowhere-v0"}, "--env_name Nowhere-v0 is not an environment"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Config(**changes).resolved()  # type: ignore[arg-type]
