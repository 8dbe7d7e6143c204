"""Meta-training and meta-test as whole programs: lives, devices, resumed runs, artefacts, bad input."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import scripts
from purejax_bilevel.configuration import replace
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Configuration
from purejax_bilevel.programs.meta_objectives import meta_test, models, network, worlds
from purejax_bilevel.programs.meta_objectives.program import Config
from purejax_bilevel.runtime import artefacts, outcomes
from purejax_bilevel.studies import command_line
from tests.programs import programs

pytestmark = pytest.mark.usefixtures("compiled_once")

SIZES = {"env_workers": 4, "train_rollout_len": 5, "lpg_gru_width": 4, "lpg_embedding_net_width": 3}
# One level, so that no program of these tests draws any.
SMALL = Config(
    env_name="GridWorld-small-3",
    num_agents=8,
    num_agent_updates=2,
    lifetime=12,
    lpg_learning_rate=1e-2,
    num_train_steps=6,
    eval_frequency=3,
    eval_agents=0,
    **SIZES,
)
TEST = meta_test.Config(
    env_name="GridWorld-small-3", num_train_steps=6, eval_frequency=3, eval_episodes=3, env_workers=4
)


def train(config: Configuration, number: int = 1, seeds: int = 1, **options: Any) -> outcomes.Outcome:
    return programs.train(config, seeds, devices=number, **options)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, outcomes.Outcome]:
    """One member on eight devices, and its folder."""
    folder = tmp_path_factory.mktemp("meta") / "run"
    folder.mkdir()
    return folder, train(SMALL, 8, folder=folder)


# --- meta-training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow  # as tests/programs/test_examples.py has it for a small program, and the optimisers' own tests
def test_a_population_learns_the_same_on_one_device(run: tuple[Path, outcomes.Outcome]) -> None:
    _, eight = run
    one = train(SMALL, 1)
    for name, array in one.rows[0].items():
        np.testing.assert_allclose(eight.rows[0][name], array, rtol=1e-4, atol=1e-5, err_msg=name)
    for a, b in zip(one.state[0].state.learning.weights, eight.state[0].state.learning.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_lives_end_one_by_one(run: tuple[Path, outcomes.Outcome]) -> None:
    """Eight agents of twelve updates, two per meta-step: ages 0 0 2 4 6 6 8 10 at the start, so all meet within six."""
    agent = run[1].state[0].state.learning.lives.judged.agent
    np.testing.assert_array_equal(agent.lifetime[0], 12)
    # After six meta-steps everyone has ended a life once, or stands at its end.
    ages = np.array([0, 0, 2, 4, 6, 6, 8, 10])
    np.testing.assert_array_equal(agent.step[0], np.where(ages == 0, 12, ages))
    np.testing.assert_allclose(run[1].rows[0]["ended_lives"][0], [4 / 3, 4 / 3])


def test_a_run_goes_on_bit_for_bit(run: tuple[Path, outcomes.Outcome], tmp_path: Path) -> None:
    whole = run[1]
    half = train(replace(SMALL, num_train_steps=3), 8, folder=tmp_path)
    longer = train(SMALL, 8, folder=tmp_path, resume=True)
    programs.same(longer.state, whole.state)
    programs.same(longer.rows, whole.rows)
    before, after = (outcome.state[0].state.learning for outcome in (half, longer))
    changes = [np.abs(a - b).max() for a, b in zip(after.weights, before.weights, strict=True)]
    assert min(changes) > 1e-3  # each step of Adam moves a weight by about 0.01
    values = [learning.lives.judged.value.network[0].kernel for learning in (before, after)]
    assert not np.array_equal(*values)


def test_bad_input() -> None:
    for changes, sentence in [
        ({"num_mini_batches": 3}, "--num_mini_batches 3 must divide the 8 agents of --num_agents"),
        ({"num_agent_updates": 13}, "--num_agent_updates 13 is above the shortest lifetime, 12 updates"),
        ({"compat": "B3"}, "--compat must be all, or some of B1, B2, B4, B5, B8 with commas, got 'B3'"),
        ({"env_name": "GridWorld-tiny"}, "GridWorld-tiny is not an environment"),
        ({"env_name": "Pendulum-v1"}, "has continuous actions"),
        ({"env_name": "Chess-MinAtar"}, "those of MinAtar are Asterix-MinAtar"),
        ({"gamma": 1.5}, "--gamma must be a number from 0 to 1"),
    ]:
        with pytest.raises(UserError, match=sentence):
            replace(SMALL, **changes).resolved()
    with pytest.raises(UserError, match="above the shortest lifetime, 4 updates"):
        Config(env_name="GridWorld-debug").resolved()


def test_the_script_finds_the_agents(capsys: pytest.CaptureFixture[str]) -> None:
    for agent, expected in (("lpg", Config), ("a2c", meta_test.Config), ("lpg_agent", meta_test.Config)):
        assert scripts.rl_configuration(["--agent_type", agent]) is expected
    words = ["--agent_type", "lpg", "--env_name", "GridWorld-small", "--num_agents", "6", "--num_mini_batches", "4"]
    assert command_line.main(scripts.rl_configuration(words), "", words) == 2
    assert "--num_mini_batches 4 must divide" in capsys.readouterr().err


# --- worlds of agents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "hidden", "optimizer"),
    [
        ("GridWorld-all", 3201, (), "sgd"),
        ("GridWorld-rand_dense", 485, (32,), "adam"),
        ("GridWorld-rand_tiny", 19, (32, 32, 32), "adam"),
        ("CartPole-v1", 4, (64, 64), "adam"),
        ("Breakout-MinAtar", 400, (64, 64), "adam"),
    ],
)
def test_agents_suit_their_world(name: str, rows: int, hidden: tuple[int, ...], optimizer: str) -> None:
    build = worlds.make(name).build
    assert (build.obs_dim, build.hidden, build.optimizer) == (rows, hidden, optimizer)


def test_a_number_means_one_level() -> None:
    assert worlds.make("GridWorld-small").params is None
    level = worlds.make("GridWorld-small-3").draw(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, level, worlds.make("GridWorld-small-3").params)


# --- meta-test --------------------------------------------------------------------------------------------------------


def test_agents_learn_under_the_artefact_of_a_run(run: tuple[Path, outcomes.Outcome]) -> None:
    """Two seeds; the second one is the same beside another."""
    learned = run[1].state[0].state.learning.weights
    artefacts.save(run[0], network.ARTEFACT_KIND, learned, [{"seed": 0}], {"compat": "B4"})
    model = models.load(str(run[0]))
    assert model.raw_clocks
    jax.tree.map(lambda found, own: np.testing.assert_array_equal(found, own[0]), model.weights, learned)
    config = replace(TEST, model=str(run[0]))
    part, both = programs.train(config, 2, devices=2)
    assert part.program.critic_outputs == 8
    assert np.isfinite(both.rows[0]["evaluation_return"]).all()
    assert (both.rows[0]["policy_entropy"] < np.log(5)).all()
    first, second = (each.state[0].state.agent for each in (both, train(config, 2, 2, seed=1)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[0]), first, second)
    assert not np.array_equal(first.actor.network[0].kernel[0], first.actor.network[0].kernel[1])


def test_levels_have_numbers() -> None:
    config = meta_test.Config(agent_type="a2c", env_name="GridWorld-small", level=(1, 4))
    config.resolved()
    with pytest.raises(UserError, match="--level is for GridWorld-<mode>"):
        replace(config, env_name="GridWorld-small-3").resolved()


def test_what_is_no_objective_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no learned objective at"):
        replace(TEST, model=str(tmp_path)).resolved()
    with pytest.raises(UserError, match="--model runs/x is for --agent_type lpg_agent, not a2c"):
        replace(TEST, agent_type="a2c", model="runs/x").resolved()
    shapes = network.shapes(8, 16, 4, False)
    weights = jax.tree.map(lambda shape: jnp.zeros((1, *shape)), shapes, is_leaf=lambda leaf: isinstance(leaf[0], int))
    cases = [
        ("policy", weights, "is a policy, not a learned objective"),
        (network.ARTEFACT_KIND, {"w": np.ones((1, 2))}, "does not have the arrays of a learned objective"),
        (network.ARTEFACT_KIND, weights._replace(target_bias=jnp.zeros((1, 3))), "do not fit together"),
    ]
    for number, (kind, tree, sentence) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        artefacts.save(folder, kind, tree, [{"seed": 0}], {})
        with pytest.raises(UserError, match=sentence):
            models.load(str(folder))
    with pytest.raises(UserError, match="members 0 to 0, got 2"):
        models.load(f"{tmp_path / '1'}#2")
