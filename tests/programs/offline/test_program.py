"""Offline agents as programs: alone, as members of a grid, sharded, resumed; what is shared; what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_rl
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import dataset_files, termination
from purejax_bilevel.programs.offline.agents import AGENTS
from purejax_bilevel.programs.offline.program import Config
from purejax_bilevel.studies import command_line
from purejax_bilevel.studies import run as runs
from tests.programs.offline import pendulum
from tests.programs.offline.pendulum import SMALL
from tests.programs.programs import same, train

pytestmark = pytest.mark.usefixtures("compiled_once")

MODEL_BASED = [name for name in AGENTS if AGENTS[name].has_model]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offline")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> str:
    return pendulum.saved(folder)


@pytest.fixture(scope="module")
def model(folder: Path, tiny: str) -> str:
    """A run's folder with two ensembles for the tiny dataset that nobody has fitted."""
    return pendulum.saved_model(folder / "model", tiny)


def config_of(agent_type: str, dataset: str, **changes: Any) -> Config:
    return Config(agent_type=agent_type, dataset=dataset, **SMALL | changes)


# --- every agent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_type", AGENTS)
def test_every_agent_measures_what_it_says(agent_type: str, tiny: str, model: str):
    """Traced, not run: state and measures keep their structure and types through stages and steps."""
    config = config_of(agent_type, tiny, **({"model": model} if agent_type in MODEL_BASED else {})).resolved()
    program = config.program()
    shared, config = jax.tree.map(jnp.asarray, (program.shared(), config))
    *_, stage = program.stages
    state = jax.eval_shape(program.init, jax.random.key(0), config, shared)
    after = state if stage.begin is None else jax.eval_shape(stage.begin, state, config, shared)
    after, metrics = jax.eval_shape(stage.update, after, config, jnp.int32(0), shared)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), after
    )
    values = jax.eval_shape(stage.evaluate, state, config, jnp.int32(0), jnp.bool_(True), shared)
    declared = {measure.name for measure in program.measures}
    assert metrics.keys() | values.keys() <= declared
    assert {"evaluation_return", "score", "final_score", "policy_loss"} <= metrics.keys() | values.keys()
    assert ("return_gap" in values) == (agent_type in MODEL_BASED)


@pytest.fixture(scope="module")
def fitted(tiny: str) -> tuple[Config, Any, Any]:
    """Ensembles of the members' own, then policies in them; 4 members on 4 devices in chunks."""
    config = config_of("mopo", tiny, pessimism=(0.0, 2.0), num_train_steps=20, eval_frequency=10)
    return config, *train(config, chunks=2, devices=4)


def test_ensemble_and_policy_in_one_run(fitted: tuple):
    _, part, outcome = fitted
    assert not outcome.failed[0].any()
    assert [stage.name for stage in part.program.stages] == ["ensemble", "policy"]
    rows = outcome.rows[0]
    assert {measure.name for measure in part.program.measures} == set(rows)
    assert rows["validation_error"].shape == (4, 4)
    assert rows["return_gap"].shape == (4, 2)
    np.testing.assert_allclose(rows["return_gap"], rows["predicted_return"] - rows["evaluation_return"], rtol=1e-4)
    np.testing.assert_allclose(rows["score"], (rows["evaluation_return"] + 1200) / 10.5, rtol=1e-4)
    for name in ("q_loss", "policy_loss", "temperature", "entropy", "uncertainty"):
        assert np.isfinite(rows[name]).all(), name


def test_members_differ_by_pessimism_and_seed_alone(fitted: tuple):
    """Members of one seed have one ensemble; with another lambda other rewards are imagined, of the same states."""
    _, part, outcome = fitted
    state = outcome.state[0][0]
    settings = [part.grid.settings(member) for member in range(4)]
    same_seed = [i for i in range(4) if settings[i]["seed"] == settings[0]["seed"]]
    first, second = same_seed
    for leaf in jax.tree.leaves(state.fit.best):
        np.testing.assert_array_equal(leaf[first], leaf[second])
    rewards = np.asarray(state.ring.rows)[..., -2]
    assert not np.array_equal(rewards[first], rewards[second])
    assert not np.array_equal(state.learner.policy[0].kernel[0], state.learner.policy[0].kernel[3])


def test_resume_is_bitwise(fitted: tuple, tmp_path: Path):
    """Broken off in the middle of the policy's stage, and in another number of chunks."""
    config, _, whole = fitted
    train(replace(config, num_train_steps=13), folder=tmp_path, devices=4)
    _, outcome = train(config, folder=tmp_path, resume=True, chunks=3, devices=4)
    same(outcome.state, whole.state)
    for name, array in whole.rows[0].items():
        np.testing.assert_array_equal(outcome.rows[0][name], array)


# --- what is shared ---------------------------------------------------------------------------------------------------


def test_dataset_and_ensemble_are_there_once(tiny: str, model: str):
    """Sub-programs of one sweep share the very arrays; no member's state has them."""
    programs = [
        config_of(name, tiny, model=model, **more).resolved().program()
        for name, more in (("mopo", {}), ("morel", {}), ("mopo", {"mode": "underestimation"}))
    ]
    first, *others = (jax.tree.leaves(program.shared()) for program in programs)
    for other in others:
        assert all(mine is its for mine, its in zip(first, other, strict=True))
    part = runs.make_part(config_of("mopo", tiny, model=model).resolved(), 1, 0)
    sizes = {leaf.shape for leaf in first if leaf.size > 100}
    config = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], part.config)
    state = jax.eval_shape(
        part.program.init, jax.random.key(0), config, jax.tree.map(jnp.asarray, programs[0].shared())
    )
    assert sizes & {leaf.shape for leaf in jax.tree.leaves(state)} == set()


def test_the_ensemble_of_a_run_says_what_it_is_made_of(folder: Path, tiny: str):
    """Its own sizes, whatever the settings here; another member of it is another ensemble."""
    place = pendulum.saved_model(folder / "wide", tiny, model_hidden_dim=9, model_activation="swish")
    config = config_of("mopo", tiny, model=place).resolved()
    assert (config.model_hidden_dim, config.model_activation) == (9, "swish")
    other = config_of("mopo", tiny, model=f"{place}#1").resolved().program()
    kernels = [program.shared()["model"].networks.trunks["obs"][0].kernel for program in (config.program(), other)]
    assert not np.array_equal(*kernels)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": ""}, "--dataset is needed"),
        ({"dataset": "nowhere.npz"}, "there is no such file"),
        ({"env_name": "MountainCarContinuous-v0"}, "is a dataset of Pendulum-v1, not of --env_name MountainCar"),
        ({"env_name": "CartPole-v1"}, "CartPole-v1 has discrete actions"),
        ({"pessimism": -0.5}, "--pessimism must be a finite number, 0 or above, got -0.5."),
        ({"mode": "epistemi"}, "--mode must be one of none, aleatoric-penalty"),
        ({"mode": "aleatoric-penalty", "model_type": "deterministic"}, "--model_type deterministic does not learn"),
        ({"agent_type": "morel", "pessimism": 3.0}, "--pessimism 3.0 changes nothing with --mode morel."),
        ({"agent_type": "offline_sac", "mode": "morel"}, "--mode morel is for --agent_type offline_mbpo"),
        ({"num_elites": 4}, "--num_elites 4 is more than the ensemble has: --model_networks 3."),
        ({"capacity": 3}, "--capacity 3 is smaller than --num_rollouts 4."),
        ({"model": "runs/nowhere"}, "no dynamics ensemble at runs/nowhere"),
        ({"real_ratio": 1.5}, "--real_ratio must be a number from 0 to 1, got 1.5."),
        ({"rollout_length": 0}, "--rollout_length must be a whole number of at least 1, got 0."),
        ({"agent_type": "mbop"}, "--agent_type must be one of offline_sac"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], sentence: str, tiny: str):
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        Config(**{"agent_type": "mopo", "dataset": tiny, **SMALL, **changes}).resolved()
    assert sentence in str(raised.value)


def test_ensembles_for_other_data_are_refused(folder: Path, tiny: str, model: str):
    other = pendulum.saved(folder, "other.npz", seed=1)
    with pytest.raises(UserError, match=f"was fitted to another dataset than --dataset {other}"):
        config_of("mopo", other, model=model).resolved()
    narrow = dataset_files.load(tiny)
    narrow = type(narrow)(
        obs=narrow.obs[:, :2],
        next_obs=narrow.next_obs[:, :2],
        action=narrow.action,
        reward=narrow.reward,
        terminated=np.asarray(termination.mountain_car_continuous(narrow.next_obs[:, :2])),
        timeout=narrow.timeout,
        environment="MountainCarContinuous-v0",
    )
    place = str(dataset_files.save(narrow, folder / "narrow.npz"))
    with pytest.raises(UserError, match=r"predicts from 4 numbers, observations and actions of .* have 2 and 1"):
        config_of("mopo", place, model=model).resolved()
    with pytest.raises(UserError, match=r"is a dataset of MountainCarContinuous-v0, not of --env_name Pendulum-v1"):
        replace(config_of("mopo", place), env_name="Pendulum-v1").resolved()


def test_aliases_are_modes(tiny: str):
    for name, mode in (
        ("aleatoric_penalty", "aleatoric-penalty"),
        ("epistemic_partitioning", "epistemic-partitioning"),
    ):
        assert config_of(name, tiny).resolved().mode == mode


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def words(tiny: str, tmp_path: Path) -> list[str]:
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [*small, "--dataset", tiny, "--output_dir", str(tmp_path), "--name", "run", "--quiet"]


def test_command_line_runs(words: list[str], tmp_path: Path):
    words = ["--agent_type", "behavioral_cloning", *words, "--num_seeds", "2"]
    assert train_rl.configuration(words) is Config
    assert command_line.main(train_rl.configuration(words), "", words) == 0
    assert (tmp_path / "run" / "results.nc").is_file()


def test_command_line_refuses_with_a_sentence(words: list[str], tiny: str, tmp_path: Path, capsys: Any):
    broken = tmp_path / "broken.npz"
    broken.write_bytes(Path(tiny).read_bytes()[:-700])
    words = ["--agent_type", "mopo", *words, "--dataset", str(broken)]
    assert command_line.main(train_rl.configuration(words), "", words) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "broken.npz" in error
    assert "Traceback" not in error
