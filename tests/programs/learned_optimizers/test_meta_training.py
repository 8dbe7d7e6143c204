"""Meta-training: fitness rises, whatever the devices; keys of lives; what is kept and refused, and what a run leaves.

Most tests train agents that descend on a bowl (`descent.py`); one meta-trains in lives of PPO and uses the weights.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import scripts
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import alone
from purejax_bilevel.programs.learned_optimizers import ARTEFACT_KIND, load_weights, open_optimizer, update_rules
from purejax_bilevel.programs.learned_optimizers import meta_training as meta
from purejax_bilevel.programs.learned_optimizers.meta_training import Config
from purejax_bilevel.programs.learned_optimizers.program import Config as PPOConfig
from purejax_bilevel.programs.learned_optimizers.update_rules import PUBLISHED
from purejax_bilevel.runtime import artefacts, loop
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.studies import command_line
from tests.programs import programs

pytestmark = pytest.mark.usefixtures("compiled_once")

SMALL = Config(
    agent_type="tests.programs.learned_optimizers.descent:DESCENT",
    env_name="GridWorld-debug",
    num_train_steps=12,
    eval_frequency=4,
    validation_lives=3,
    population=8,
    sigma=0.3,
    es_lr=0.2,
    first_mean="random_features",
    num_iterations=3,
    num_steps=5,
    num_envs=2,
    num_minibatches=2,
    num_epochs=2,
)


@pytest.fixture(scope="module")
def on_two() -> Any:
    return programs.train(SMALL, 1, devices=2)[1]


@pytest.mark.slow  # as tests/programs/test_examples.py has it for a small program
def test_a_population_is_the_same_on_any_number_of_devices(on_two: Any) -> None:
    for number in (1, 8):
        other = programs.train(SMALL, 1, devices=number)[1]
        for name, array in on_two.rows[0].items():
            np.testing.assert_allclose(other.rows[0][name], array, rtol=2e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(other.state[0].state.best, on_two.state[0].state.best, atol=2e-4)


def test_it_goes_on_bit_for_bit(on_two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was broken off between two evaluations."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    original = CompiledProgram.__call__

    def breaking(self: CompiledProgram, state: Any, start: int, *others: int) -> Any:
        if start >= 6:
            raise RuntimeError("power cut")
        return original(self, state, start, *others)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledProgram, "__call__", breaking)
        with pytest.raises(RuntimeError, match="power cut"):
            programs.train(SMALL, 1, devices=2, folder=tmp_path, chunks=6)
    assert loop.steps_done(tmp_path) == 6
    resumed = programs.train(SMALL, 1, devices=2, folder=tmp_path, resume=True, chunks=3)[1]
    programs.same(resumed.state, on_two.state)
    programs.same(resumed.rows, on_two.rows)


def test_fitness_rises_for_every_meta_seed_and_the_best_mean_is_kept() -> None:
    """Members side by side, with two rates; zeros change nothing, so that the first fitness is that of no optimiser."""
    config = replace(SMALL, es_lr=(1e-6, 0.1), num_train_steps=60, eval_frequency=10, population=16)
    part, outcome = programs.train(config, 2, devices=1, member_batch=0)
    rows, state = outcome.rows[0], outcome.state[0].state
    fitness = rows["fitness_at_mean"]
    assert fitness.shape == (4, 6)
    still, moved = fitness[:2], fitness[2:]
    assert (moved[:, -1] > moved[:, 0]).all()
    assert (moved[:, -1] > 0.5 * still[:, -1]).all()  # half of the loss is gone
    np.testing.assert_allclose(still, still[:, :1] * jnp.ones(6), rtol=1e-3)
    np.testing.assert_allclose(rows["best_at_mean"], np.maximum.accumulate(fitness, 1), rtol=1e-6)
    again = jax.jit(lambda weights, key: validation(part.program, weights, key))
    for member in range(4):
        kept = again(state.best[member], jax.random.key(member % 2))
        np.testing.assert_allclose(kept, rows["best_at_mean"][member, -1], rtol=1e-4)


def validation(program: Any, weights: jax.Array, key: jax.Array) -> jax.Array:
    """Fitness of weights in the lives that a member validates in."""
    config = replace(SMALL, num_train_steps=60, eval_frequency=10, population=16)
    own = meta._stream(key, meta.VALIDATION, 0)
    lives = [program.life(weights, meta._stream(own, 0, index), config) for index in range(config.validation_lives)]
    return program.fitness(jnp.stack(lives).mean()[None])


# --- keys of lives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shaping", ["ranks", "pairs"])
def test_lives_have_the_keys_that_they_should(shaping: str) -> None:
    """All candidates share them, or mirrored pairs alone; rollouts, environments and the mean have others."""
    further = {"further_envs": "GridWorld-rand_tiny", "fitness_ranges": "0:1,0:1", "num_iterations": 10}
    config = replace(SMALL, population=6, num_rollouts=2, fitness_shaping=shaping)
    config = (replace(config, **further) if shaping == "pairs" else config).resolved()
    program, weights = config.program(), jnp.asarray(load_weights(PUBLISHED / "breakout_OPEN.npy"))

    def lived(is_training: jax.Array) -> jax.Array:
        state = program.init(jax.random.key(0), config)
        state = state.replace(search=state.search._replace(mean=weights))
        equals = jnp.broadcast_to(weights, (config.population, len(weights)))
        return program._returns(state, equals, config, jnp.int32(3), is_training)

    lived = jax.jit(alone(lived))
    returns = np.asarray(lived(True)).reshape(-1, 6, 2)
    assert len(returns) == (2 if shaping == "pairs" else 1)
    for own in returns:
        assert len(np.unique(own)) == (6 if shaping == "pairs" else 2)
        np.testing.assert_array_equal(own[:3], own[3:])
    assert not np.isin(returns[0], returns[1:]).any()
    validated = np.asarray(lived(False))[:, : config.validation_lives]
    assert all(len(np.unique(own)) == config.validation_lives for own in validated)
    assert not np.isin(validated, returns).any()


# --- several environments ---------------------------------------------------------------------------------------------


def test_fitness_is_the_mean_over_normalised_returns() -> None:
    config = replace(SMALL, env_name="CartPole-v1", further_envs="Acrobot-v1", num_iterations=100).resolved()
    program = config.program()
    np.testing.assert_allclose(program.fitness(jnp.asarray([250.0, -500.0])), 0.25)
    np.testing.assert_allclose(program.fitness(jnp.asarray([[500.0, 0.0], [-80.0, -290.0]])), [1.0, 0.25])
    for text in ("0:100, -100:-50", "0:100 -100:-50"):
        ranged = replace(config, fitness_ranges=text).resolved().program()
        np.testing.assert_allclose(ranged.fitness(jnp.asarray([50.0, -25.0])), 1.0)


def test_a_failed_life_is_the_worst_fitness_and_is_counted() -> None:
    metrics = {name: value / count for name, (value, count) in meta._metrics(jnp.asarray([1.0, jnp.nan, 4.0])).items()}
    assert metrics["fitness"] == 2.5
    assert metrics["best_fitness"] == 4.0
    assert metrics["worst_fitness"] == 1.0
    np.testing.assert_allclose(metrics["failed_lives"], 1 / 3, rtol=1e-6)
    none = meta._metrics(jnp.full(2, jnp.nan))
    assert none["fitness"][1] == 0.0
    assert none["failed_lives"][0] == 1.0


# --- starts -----------------------------------------------------------------------------------------------------------


def test_the_first_mean_changes_nothing() -> None:
    params = {"actor": {"Dense_0": {"bias": jnp.arange(3.0)}}, "critic": {"Dense_0": {"bias": jnp.ones(2)}}}
    layers = {name: {"Dense_0": layer["Dense_0"]["bias"]} for name, layer in params.items()}

    @jax.jit
    def updates(weights: jax.Array) -> Any:
        optimiser = open_optimizer(weights)
        clues = {"training_clock": 0.5, "batch_clock": 0.5, "key": jax.random.key(0)}
        return optimiser.update(params, optimiser.init(params), params, activations=layers, **clues)[0]

    assert not meta.first_mean(jax.random.key(0), Config()).any()
    random = meta.first_mean(jax.random.key(0), Config(first_mean="random_features"))
    assert random.any()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates(random)))
    moved = updates(random.at[-1:].set(1.0).at[-3:].add(1.0))  # the last rows are those of the output layer
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(moved))


def test_published_weights_may_be_the_start() -> None:
    path = str(PUBLISHED / "multi_OPEN.npy")
    config = replace(SMALL, model=path, larger=True).resolved()
    program = config.program()
    state = alone(program.init)(jax.random.key(0), config, program.shared())
    np.testing.assert_array_equal(state.search.mean, load_weights(path))


@pytest.mark.parametrize("path", sorted(update_rules.TRAINED.glob("*.safetensors")), ids=lambda path: path.stem)
def test_own_weights_are_small_and_read_by_name(path: Path) -> None:
    assert sum(file.stat().st_size for file in (path, path.with_suffix(".json"))) < 100_000
    artefact = artefacts.load(path, ARTEFACT_KIND)
    for member in range(len(artefact.about["members"])):
        weights = update_rules.load(f"{path.stem}#{member}")
        np.testing.assert_array_equal(weights, artefact.member(member)["weights"])
        assert np.abs(weights).max() > 0.1
    assert artefact.about["config"]["agent_type"] == "open_training"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"population": 7}, "--population must be an even whole number from 2 to 1000000, got 7"),
        ({"num_epochs": 1}, "--num_epochs 1 is too few"),
        ({"num_train_steps": 10}, "--num_train_steps 10 must be a multiple of --eval_frequency 4"),
        ({"num_iterations": 1}, "--num_iterations must be a whole number of at least 2, got 1"),
        ({"num_steps": 3, "num_minibatches": 4}, "cannot be divided into --num_minibatches 4"),
        ({"num_steps": 1}, "too short for GridWorld-debug: its fitness is measured from step 3 on"),
        ({"fitness_iterations": 4}, "--fitness_iterations 4 is above --num_iterations 3"),
        ({"env_name": "Nowhere-v0"}, "Nowhere-v0"),
        ({"further_envs": "Nowhere-v0"}, "--fitness_ranges must be given"),
        ({"further_envs": "Nowhere-v0", "fitness_ranges": "0:1,0:1"}, "Nowhere-v0"),
        ({"further_envs": "GridWorld-debug", "fitness_ranges": "0:1,0:1"}, "every environment must be named once"),
        ({"fitness_ranges": "0:1,0:1"}, "must have low:high for each of GridWorld-debug"),
        ({"fitness_ranges": "1:1"}, "two different numbers"),
        ({"fitness_ranges": "one"}, "two different numbers"),
        ({"fitness_ranges": "0:1e39"}, "two different numbers"),
        ({"env_name": "CartPole-v1", "num_iterations": 200, "draw_level": True}, "--draw_level is for Grid-Worlds"),
        ({"optimizer": "adam"}, "--optimizer must be one of open, no_features, got 'adam'"),
        ({"lr": 0.1}, "--lr 0.1 is for --optimizer"),
        ({"model": str(PUBLISHED / "multi_OPEN.npy")}, "has 3571 weights, --larger False has 1211"),
        ({"model": "nowhere"}, "no learned optimiser at nowhere"),
        ({"agent_type": "ppo"}, "--agent_type must be one of open_training"),
    ],
)
def test_bad_input_gets_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace(":", r"\:")):
        replace(SMALL, **changes).resolved()


# --- lives of PPO -----------------------------------------------------------------------------------------------------

PPO = (
    "--env_name GridWorld-debug --num_envs 2 --num_steps 5 --num_epochs 2 --num_minibatches 2 --hidden_dim 4 "
    "--num_layers 1 --quiet --devices 1"
)


def command(text: str) -> int:
    return command_line.main(lambda: scripts.rl_configuration(text.split()), "", text.split())


def test_a_command_leaves_weights_that_agents_train_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    train = (
        f"--agent_type open_training {PPO} --num_iterations 3 --population 4 --num_train_steps 2 --eval_frequency 1 "
        "--draw_level --fitness_shaping pairs --sigma 0.3 --validation_lives 2 --name meta"
    )
    assert command(train) == 0
    found = artefacts.load("runs/meta", ARTEFACT_KIND).member(0)
    assert {name: array.shape for name, array in found.items()} == {"weights": (1211,), "last": (1211,)}
    assert open_optimizer(found["weights"]).init({"kernel": jnp.ones((2, 2))}).carry.shape == (8, 4)
    agent = PPOConfig(optimizer="open", model="runs/meta").resolved().program()
    np.testing.assert_array_equal(agent.shared(), found["weights"])
    artefacts.save(tmp_path / "runs" / "policy", "policy", {"weights": found["weights"][None]}, [{}], {})
    for bad, sentence in (
        ("--population 3", "even whole number"),
        ("--model runs/policy", "is a policy, not a learned"),
    ):
        capsys.readouterr()
        assert command(f"{train} {bad}") == 2
        assert sentence in capsys.readouterr().err
