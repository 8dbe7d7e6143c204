"""PPO as a training program: alone, as a member of a grid, vmapped, sharded over eight devices, in chunks and resumed.

Programs are tiny; what is compared is the whole state and every recorded number.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train_rl
from purejax_bilevel import load_policy
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.learned_optimizers import ARTEFACT_KIND, program, update_rules
from purejax_bilevel.programs.learned_optimizers.program import Config
from purejax_bilevel.runtime import artefacts, loop, outcomes
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.studies import command_line, plan, presets, study
from tests.programs.programs import own_run, same, train

pytestmark = pytest.mark.usefixtures("compiled_once")

STEPS = 12
BREAKOUT = str(update_rules.PUBLISHED / "breakout_OPEN.npy")
SMALL = Config(
    num_train_steps=STEPS,
    eval_frequency=4,
    eval_episodes=2,
    final_eval_episodes=3,
    num_envs=3,
    num_steps=8,
    num_epochs=2,
    num_minibatches=3,
    hidden_dim=5,
)


@pytest.fixture(scope="module")
def trained() -> tuple[Config, Any, outcomes.Outcome]:
    """OPEN; four settings, two seeds, in two chunks."""
    config = replace(
        SMALL,
        optimizer="open",
        model="ant",
        activation="tanh",
        normalize_observations=True,
        normalize_rewards=True,
        entropy_weight=(0.0, 0.1),
        gae_lambda=(0.8, 0.95),
    )
    return config, *train(config, chunks=2)


def test_runs_in_one_compilation(trained: tuple) -> None:
    _, part, outcome = trained
    assert outcome.num_traces == 1
    assert outcome.steps == STEPS
    assert not outcome.failed[0].any()
    rows = outcome.rows[0]
    assert set(rows) == {measure.name for measure in part.program.measures}
    for name in set(rows) - {"training_return", "final_return"}:
        assert rows[name].shape == (len(part.grid), 3)
        assert np.isfinite(rows[name]).all(), name
    played = np.isfinite(rows["final_return"]).sum(-1)
    np.testing.assert_array_equal(played, np.broadcast_to([2, 2, 3], played.shape))
    assert 0 <= rows["dormant_share"].min() <= rows["dormant_share"].max() < 1
    assert (rows["update_norm"] > 0).all()


def test_every_bias_learns_and_members_differ(trained: tuple) -> None:
    """Biases start at zero."""
    _, part, outcome = trained
    for path, leaf in jax.tree_util.tree_leaves_with_path(outcome.state[0][0].agent.learner.params):
        assert len(np.unique(leaf.reshape(len(part.grid), -1), axis=0)) == len(part.grid)
        assert path[-1].key == "kernel" or leaf.all()


@pytest.mark.slow  # as for Q-learning: tests/programs/control/test_q_learning.py
def test_member_equals_a_run_of_its_own(trained: tuple) -> None:
    """The last member of a grid on eight devices, and alone on one: programs of other shapes, equal to rounding."""
    config, part, outcome = trained
    member = len(part.grid) - 1
    single = own_run(config, part, member)
    for name, array in single.rows[0].items():
        np.testing.assert_allclose(array[0], outcome.rows[0][name][member], rtol=2e-3, atol=1e-4, err_msg=name)
    own, other = single.state[0][0].agent.learner.params, outcome.state[0][0].agent.learner.params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[member], rtol=1e-3, atol=1e-4), own, other)


@pytest.mark.slow  # the map over members is that of tests/programs/control/test_q_learning.py
def test_vmapped_members_agree(trained: tuple) -> None:
    """All at once, where the run had one member after the other."""
    config, _, outcome = trained
    _, together = train(config, member_batch=0)
    for name in ("loss", "training_return", "update_norm"):
        np.testing.assert_allclose(together.rows[0][name], outcome.rows[0][name], rtol=1e-3, atol=1e-5)


def test_resume_is_bitwise(trained: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off after six iterations, between two evaluations. A longer run would be another one: its rates differ."""
    config, _, whole = trained
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    original = CompiledProgram.__call__

    def breaking(self: CompiledProgram, state: Any, start: int, *others: int) -> Any:
        if start >= 6:
            raise RuntimeError("power cut")
        return original(self, state, start, *others)

    monkeypatch.setattr(CompiledProgram, "__call__", breaking)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config, folder=tmp_path, chunks=4)
    monkeypatch.undo()
    assert loop.steps_done(tmp_path) == 6
    _, resumed = train(config, folder=tmp_path, resume=True, chunks=5)
    same(resumed.state, whole.state)
    same(resumed.rows, whole.rows)
    with pytest.raises(UserError, match="horizon"):
        train(replace(config, num_train_steps=2 * STEPS), folder=tmp_path, resume=True)


def test_members_have_levels_of_their_own() -> None:
    """Where an agent starts is the first thing that it observes."""
    config = replace(SMALL, env_name="GridWorld-rand_tiny", draw_level=True).resolved()
    made = config.program()
    init = jax.vmap(lambda seed: made.init(jax.random.key(seed), config))
    state = jax.jit(init).lower(jnp.arange(8)).compile()(jnp.arange(8))
    cells = np.asarray(state.level.start_cell)
    assert len(np.unique(cells)) > 1
    for cell, obs in zip(cells, np.asarray(state.agent.obs), strict=True):
        np.testing.assert_array_equal(obs[:, :9].argmax(1), cell)


# --- from the command line --------------------------------------------------------------------------------------------


def test_the_script_leaves_a_policy(tmp_path: Path) -> None:
    arguments = "--agent_type ppo --env_name CartPole-v1 --num_train_steps 2 --num_envs 2 --num_steps 8 --hidden_dim 4"
    others = "--num_minibatches 2 --normalize_observations --eval_episodes 1 --final_eval_episodes 1 --quiet"
    given = [*f"{arguments} {others} --name run --output_dir".split(), str(tmp_path)]
    assert train_rl.configuration(given) is Config
    assert command_line.main(Config, "", given) == 0
    policy = artefacts.load(tmp_path / "run", "policy").member(0)
    assert policy["params.actor.Dense_0.kernel"].shape == (4, 4)
    assert policy["observations.mean"].shape == (4,)
    obs = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    hidden = (obs - policy["observations.mean"]) / np.sqrt(policy["observations.variance"] + 1e-8)
    layers = sum(name.startswith("params.actor") and name.endswith("kernel") for name in policy)
    for layer in range(layers):
        own = f"params.actor.Dense_{layer}"
        hidden = (hidden if layer == 0 else np.maximum(hidden, 0)) @ policy[f"{own}.kernel"] + policy[f"{own}.bias"]
    np.testing.assert_array_equal(load_policy(str(tmp_path / "run"))(obs), hidden.argmax(1))
    with pytest.raises(UserError, match="is a policy, not a learned optimiser"):
        replace(SMALL, optimizer="open", model=str(tmp_path / "run")).resolved()


def test_weights_of_this_project(tmp_path: Path) -> None:
    """An artefact with two members, the second of which is asked for."""
    vectors = np.stack([np.zeros(1211, np.float32), np.load(BREAKOUT)])
    artefacts.save(tmp_path, ARTEFACT_KIND, {"weights": vectors}, [{}, {}], {})
    np.testing.assert_array_equal(update_rules.load(f"{tmp_path}#1"), np.load(BREAKOUT))
    with pytest.raises(UserError, match="members 0 to 1, got 2"):
        replace(SMALL, optimizer="open", model=f"{tmp_path}#2").resolved()


OPEN = {"optimizer": "open", "model": "ant"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"env_name": "NoSuch-v0"}, "--env_name NoSuch-v0 is not an environment"),
        ({"env_name": "GridWorld-no"}, "--env_name GridWorld-no is not an environment"),
        ({"draw_level": True}, "--draw_level is for Grid-Worlds, GridWorld-<mode>, not for CartPole-v1."),
        ({"draw_level": True, "env_name": "GridWorld-small-3"}, "must have no number, got GridWorld-small-3"),
        ({"num_minibatches": 5}, "3 x --num_steps 8 = 24 samples cannot be divided into --num_minibatches 5"),
        ({"num_train_steps": 2**30}, "more than can be counted"),
        ({"horizon": 3}, "--horizon 3 is below --num_train_steps 12"),
        ({"optimizer": "adagrad"}, "--optimizer must be one of adam, rmsprop, lion, sgd, open, no_features"),
        ({"optimizer": "open"}, "--optimizer open and no_features need --model"),
        ({"optimizer": "open", "model": "nowhere.npy"}, "no weights of OPEN at nowhere.npy"),
        ({"optimizer": "open", "model": "runs/nowhere"}, "no learned optimiser at runs/nowhere"),
        ({"model": "ant"}, "--model ant is for --optimizer open, no_features, not adam."),
        ({"without": "noise"}, "--without noise is for --optimizer open, no_features, not adam."),
        ({**OPEN, "lr": 0.1}, "--lr 0.1 is for --optimizer adam, rmsprop, lion, sgd, not open."),
        ({"optimizer": "sgd", "beta2": (0.1, 0.2)}, "--beta2 0.1 0.2 is for --optimizer adam, rmsprop, lion, not sgd."),
        ({**OPEN, "num_epochs": 1}, "--num_epochs 1 is too few for --optimizer open"),
        ({**OPEN, "num_train_steps": 1}, "--num_train_steps 1 is too few for --optimizer open"),
        ({"clip": 0.0}, "--clip must be a finite number above 0"),
        ({"anneal": 1.5}, "--anneal must be a number from 0 to 1"),
        ({"agent_type": "omd"}, "--agent_type must be one of ppo"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        replace(SMALL, **changes).resolved()
    assert sentence in str(raised.value)


@pytest.mark.parametrize("length", [0, 1210, 3572])
def test_weights_of_a_wrong_length(tmp_path: Path, length: int) -> None:
    np.save(tmp_path / "w.npy", np.zeros(length, np.float32))
    with pytest.raises(UserError, match=f"1211 .* 3571 .* got {length}"):
        replace(SMALL, optimizer="open", model=str(tmp_path / "w.npy")).resolved()


def test_a_switch_off_needs_no_clock() -> None:
    assert replace(SMALL, **OPEN, num_epochs=1, without="batch_clock").resolved().num_epochs == 1
    assert replace(SMALL, optimizer="no_features", model="ant", num_epochs=1).resolved().num_epochs == 1


def test_rates_fill_in_only_what_is_not_given() -> None:
    config = Config(optimizer="rmsprop", lr=1.0).resolved()
    assert (config.lr, config.beta2, config.epsilon) == (1.0, 0.99, 1e-8)
    assert config.resolved() == config
    assert Config(**OPEN).resolved().resolved() == Config(**OPEN).resolved()


def test_tuned_rates_and_published_weights_are_those_of_the_environment() -> None:
    """Tables 4 to 6 of the paper (spec, appendix B)."""
    made = [
        Config(env_name="Breakout-MinAtar", optimizer=name).resolved() for name in ("adam", "rmsprop", "lion", "open")
    ]
    assert [(config.lr, config.anneal) for config in made[:3]] == [(0.01, 1.0), (0.002, 0.0), (0.0008, 0.0)]
    assert (made[0].beta1, made[0].beta2, made[2].beta2) == (0.9, 0.99, 0.9)
    assert [config.model for config in made] == ["", "", "", "breakout"]
    assert Config(env_name="GridWorld-rand_all-3", optimizer="open").resolved().model == "gridworld"
    np.testing.assert_array_equal(made[3].program().shared(), np.load(BREAKOUT))
    assert made[3].program().shared() is made[3].program().shared()  # one object, which sub-programs share


def test_sizes_of_published_agents() -> None:
    """Parameters of actor and critic, spec section 2.6, and what their optimiser takes in."""
    sizes = {
        ("Breakout-MinAtar", 64): (30_019, 29_889),
        ("Asterix-MinAtar", 64): (30_149, 29_889),
        ("Freeway-MinAtar", 64): (49_219, 49_089),
        ("SpaceInvaders-MinAtar", 64): (42_884, 42_689),
        ("GridWorld-rand_all", 16): (9_989, 9_921),
    }
    for (name, width), expected in sizes.items():
        config = Config(env_name=name, hidden_dim=width, optimizer="open", model="multi").resolved()
        made = program.PolicyOptimization(config)
        state = jax.eval_shape(lambda made=made, config=config: made.init(jax.random.key(0), config, made.shared()))
        params = state.agent.learner.params
        assert tuple(sum(leaf.size for leaf in jax.tree.leaves(params[net])) for net in params) == expected
        assert state.agent.learner.optimizer.carry.shape == (16, sum(expected))


@pytest.mark.parametrize(
    ("preset", "iterations", "updates"), [("open_minatar", 1220, 39_040), ("open_gridworld_transfer", 1464, 46_848)]
)
def test_lengths_of_the_published_lives(preset: str, iterations: int, updates: int) -> None:
    """Iterations and steps of the optimiser, spec section 3.1."""
    for agent in plan.make_agents(study.parse(presets.preset(preset, "paper"))):
        for template in agent.templates:
            config = template.config
            assert config.num_train_steps == iterations
            assert iterations * config.num_epochs * config.num_minibatches == updates
