"""Agents in the environment: when they do what, as one program; what they begin from; what is refused."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_rl
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import ensemble, fitting, refitting, schedule, settings
from purejax_bilevel.programs.offline.agents import ONLINE_AGENTS
from purejax_bilevel.programs.offline.online import Config
from purejax_bilevel.programs.offline.schedule import Schedule
from purejax_bilevel.studies import command_line
from tests.programs import programs
from tests.programs.offline import pendulum

TINY: dict[str, Any] = {
    **pendulum.SMALL,
    "num_layers": 1,
    "model_epochs": 2,
    "model_epoch_steps": 1,
    "model_joint": True,
    "num_train_steps": 60,
    "init_steps": 20,
    "model_every": 10,
    "updates_per_step": 1,
}


def config_of(agent_type: str = "mbpo", **changes: Any) -> Config:
    return Config(agent_type=agent_type, **TINY | changes)


# --- schedules --------------------------------------------------------------------------------------------------------


def places(found: Any) -> list[int]:
    return np.flatnonzero(np.asarray(found)).tolist()


def test_schedules_of_the_reference():
    """Action logs of the reference's tests: (b) online, (d) after 300 offline steps with an ensemble fitted there."""
    online, after = Schedule(300, 50, 50, False), Schedule(0, 0, 50, True)
    steps = np.arange(500)
    assert places(online.fits(steps)) == [300, 350, 400, 450]
    assert places(online.is_random(steps)) == list(range(50))
    assert [300 + step for step in places(after.fits(steps))] == list(range(350, 800, 50))
    assert places(after.is_random(steps)) == []


def test_rollouts_get_longer():
    """MBPO's rule; the values are those of the reference for [1, 15, 20, 100]."""
    t = np.array([1, 20, 50, 100, 120])
    np.testing.assert_array_equal(schedule.rollout_length(t, 1, 15, 20, 100), [1, 1, 6, 15, 15])
    np.testing.assert_array_equal(schedule.rollout_length(t, 7, 0, 20, 100), 7)  # no other length
    np.testing.assert_array_equal(schedule.rollout_length(t, 10, 2, 0, 0), 2)
    whole = schedule.rollout_length(np.arange(0, 101), 0, 100, 0, 100)
    np.testing.assert_array_equal(whole, np.arange(101))  # not rounded down to one less


@pytest.mark.slow  # compiles the whole program, as the last test of this file does
def test_a_program_keeps_to_its_schedule():
    """Case (a) and (b) by what changes: networks, policy, imagined rows, and whether actions are the policy's."""
    config = config_of(num_train_steps=500, init_steps=300, random_steps=50, model_every=50).resolved()
    program = config.program()

    def logged(state: Any, t: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        after, _ = programs.step(program, state, config, t)
        changed = lambda old, new: (old != new).any()  # noqa: E731
        return after, {
            "fits": changed(state.fit.networks.trunks["obs"][0].kernel, after.fit.networks.trunks["obs"][0].kernel),
            "updates": changed(state.learner.policy[0].kernel, after.learner.policy[0].kernel),
            "imagines": after.ring.pointer != state.ring.pointer,
            "is_random": jnp.abs(after.storage[t, -3]) < 1.0,
            "stored": after.storage[t, :-2].any(),
        }

    @jax.jit
    def run() -> tuple[Any, dict[str, jax.Array]]:
        state = program.init(jax.random.key(0), config, ())
        *layers, last = state.learner.policy
        always = last._replace(bias=jnp.array([30.0, -20.0]))  # the policy's action is 1
        state = state.replace(learner=state.learner.replace(policy=(*layers, always)))
        return jax.lax.scan(logged, state, jnp.arange(500))

    state, log = run()
    assert places(log["fits"]) == [300, 350, 400, 450]
    assert places(log["updates"]) == places(log["imagines"]) == list(range(300, 500))
    assert places(log["is_random"]) == list(range(50))
    assert log["stored"].all()
    starts, ring = np.asarray(state.storage[:, :3]), np.asarray(state.ring.rows[: int(state.ring.size)])
    assert int(state.ring.size) == TINY["capacity"]
    assert {tuple(row) for row in ring[:, :3]} <= {tuple(row) for row in starts}  # of length 1: all begin there
    np.testing.assert_allclose(state.learner.units.mean, starts[:300].mean(0), rtol=1e-4)


# --- fitting again ----------------------------------------------------------------------------------------------------


def test_held_out_places_are_every_fifth_and_stay():
    every = refitting.period(settings.Fitting())
    assert every == 5
    for stored in (5, 9, 23):
        held_out = stored // every
        learned = refitting.learned_places(np.arange(stored - held_out), every)  # type: ignore[arg-type]
        others = refitting.held_out_places(np.arange(held_out), every)  # type: ignore[arg-type]
        assert sorted([*learned, *others]) == list(range(stored))
        assert all(place % every == every - 1 for place in others)


def test_fits_see_stored_rows_alone_and_learn_from_no_held_out_one():
    config = replace(
        settings.Fitting(),
        model_networks=2,
        model_hidden_dim=4,
        model_layers=1,
        model_joint=True,
        model_batch_size=8,
        model_epochs=3,
        model_patience=100,
    )
    architecture = fitting.architecture_of(config, 2, 1)
    random, stored = np.random.default_rng(0), 53
    rows = random.standard_normal((100, 7)).astype(np.float32)
    rows[stored:] = np.nan  # what is not stored
    changed = rows.copy()
    changed[4:stored:5, 2:4] += 1.0  # next observations of held-out rows

    @jax.jit
    def run(rows: jax.Array) -> tuple[fitting.Fit, jax.Array]:
        fit = fitting.begin(config, architecture, ensemble.no_normaliser(architecture), jax.random.key(0))
        found, _, epochs = refitting.refit(config, architecture, fit, rows, jnp.int32(stored), jax.random.key(1))
        return found, epochs

    (found, epochs), (other, _) = run(rows), run(changed)
    assert int(epochs) == 3
    columns = np.concatenate([rows[:stored, :2], rows[:stored, 4:5]], 1)
    np.testing.assert_allclose(found.normaliser.mean, columns.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.normaliser.std, columns.std(0, ddof=1), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found.networks, other.networks)
    assert np.isfinite(found.networks.trunks["obs"][0].kernel).all()
    assert np.isfinite(found.best_errors).all()
    assert (np.asarray(found.best_errors) < np.asarray(other.best_errors)).all()


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_type", ONLINE_AGENTS)
def test_every_agent_measures_what_it_says(agent_type: str):
    """Traced, not run: state and measures keep their structure and types through steps."""
    changes = {"mode": "morel", "last_rollout_length": 5, "num_envs": 2} if agent_type == "mbpo" else {}
    config = config_of(agent_type, **changes).resolved()
    program = config.program()
    assert program.stages[0].warm_up == 20
    config = jax.tree.map(jnp.asarray, config)
    state = jax.eval_shape(program.init, jax.random.key(0), config, ())
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    for step in (program.collect, program.update):
        after, metrics = jax.eval_shape(step, state, config, jnp.int32(0))
        assert shapes(after) == shapes(state)
    values = jax.eval_shape(program.evaluate, state, config, jnp.int32(0), jnp.bool_(True), ())
    assert metrics.keys() | values.keys() == {measure.name for measure in program.measures}
    assert ("return_gap" in values) == (agent_type == "mbpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("online")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"init_steps": 3},
            "--init_steps 3 with 1 environments leaves 3 transitions for the first fit of the ensemble",
        ),
        ({"init_steps": -1}, "--init_steps must be a whole number of at least 0, got -1."),
        ({"agent_type": "online_sac", "last_rollout_length": 5}, "--last_rollout_length 5 is for --agent_type mbpo"),
        ({"agent_type": "online_sac", "mode": "morel"}, "--mode morel is for --agent_type mbpo, not online_sac."),
        ({"pessimism": 3.0}, "--pessimism 3.0 changes nothing with --mode none."),
        ({"num_elites": 9}, "--num_elites 9 is more than the ensemble has: --model_networks 3."),
        ({"env_name": "CartPole-v1"}, "CartPole-v1 has discrete actions"),
        ({"model": "runs/nowhere"}, "no dynamics ensemble at runs/nowhere"),
        ({"policy": "runs/nowhere"}, "no policy at runs/nowhere"),
        ({"real_ratio": 1.5}, "--real_ratio must be a number from 0 to 1, got 1.5."),
        ({"updates_per_step": 2**30}, "is more than can be counted"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        config_of(**changes).resolved()
    assert sentence in str(raised.value)


def test_a_buffer_may_begin_with_a_dataset(folder: Path):
    place = pendulum.saved(folder)
    config = config_of(dataset=place, dataset_rows=101, num_envs=2, init_steps=0).resolved()
    assert (config.random_steps, config.real_capacity) == (0, 220)  # 100 + 120, a multiple of 10
    program = config.program()
    rows = program.shared()["rows"]
    state = jax.eval_shape(program.init, jax.random.key(0), config, program.shared())
    assert state.storage.shape == (220, rows.shape[1])
    with pytest.raises(UserError, match="--real_capacity 50 is smaller than the dataset, which has 100 rows"):
        config_of(dataset=place, dataset_rows=101, num_envs=2, real_capacity=50).resolved()
    with pytest.raises(UserError, match="is a dataset of Pendulum-v1, not of --env_name MountainCar"):
        config_of(dataset=place, env_name="MountainCarContinuous-v0").resolved()


@pytest.mark.slow  # compiles the whole program
def test_members_resume_and_command_line(tmp_path: Path):
    """Members of a grid; a run that is broken off ends in the same bits; a run leaves policy and ensemble."""
    config = config_of(rollout_length=(1, 4), real_ratio=(0.0, 0.5), model_epochs=3, real_capacity=60)
    part, whole = programs.train(config, devices=2)
    assert not whole.failed[0].any()
    rows = whole.rows[0]
    assert {measure.name for measure in part.program.measures} == set(rows)
    for name in ("validation_error", "return_gap"):  # nothing before the first fit
        np.testing.assert_array_equal(np.isfinite(rows[name]), [[False, True, True]] * 8)
    np.testing.assert_array_equal(rows["rollout_length"][::2, -1], [1, 1, 4, 4])
    programs.train(replace(config, num_train_steps=33), folder=tmp_path / "broken", devices=2)
    _, outcome = programs.train(config, folder=tmp_path / "broken", resume=True, chunks=3, devices=2)
    programs.same(outcome.state, whole.state)
    small = [word for name, value in TINY.items() if name != "model_joint" for word in (f"--{name}", str(value))]
    words = ["--agent_type", "mbpo", *small, "--model_joint", "--output_dir", str(tmp_path), "--name", "run", "--quiet"]
    assert train_rl.configuration(words) is Config
    assert command_line.main(train_rl.configuration(words), "", words) == 0
    assert (tmp_path / "run" / "artefact.safetensors").is_file()
    assert (tmp_path / "run" / "ensemble" / "artefact.safetensors").is_file()
