"""GROOVE and TA-LPG: whole runs of one member on two devices, broken off and continued; what is refused."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejax_bilevel import evolution
from purejax_bilevel.configuration import replace
from purejax_bilevel.environments import grid_world
from purejax_bilevel.errors import UserError
from purejax_bilevel.evolution import Strategy
from purejax_bilevel.program import alone
from purejax_bilevel.programs.meta_objectives import curriculum, groove
from purejax_bilevel.programs.meta_objectives.program import Config
from purejax_bilevel.programs.meta_objectives.settings import ObjectiveSearch
from purejax_bilevel.runtime import loop
from purejax_bilevel.runtime.compiled import CompiledProgram
from tests.programs.programs import same, train

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = {
    "env_name": "GridWorld-debug",
    "env_workers": 3,
    "train_rollout_len": 4,
    "lpg_gru_width": 4,
    "lpg_embedding_net_width": 2,
    "lpg_target_width": 3,
    "lifetime": 6,
    "eval_agents": 0,
}
GROOVE = Config(
    agent_type="groove", num_agents=4, num_agent_updates=2, buffer_size=12, num_train_steps=12, eval_frequency=6, **TINY
)
TA_LPG = Config(agent_type="ta_lpg", population=8, num_mini_batches=2, num_train_steps=4, eval_frequency=2, **TINY)


@pytest.fixture(scope="module")
def groove_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A run of one member, whose population is on two devices, and a copy of its folder from the middle of it."""
    return broken_off(GROOVE, tmp_path_factory.mktemp("groove"))


@pytest.fixture(scope="module")
def ta_lpg_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The same of TA-LPG."""
    return broken_off(TA_LPG, tmp_path_factory.mktemp("ta_lpg"))


def broken_off(config: Config, place: Path) -> tuple[Any, Path]:
    original, half, folder, copy = CompiledProgram.__call__, config.num_train_steps // 2, place / "run", place / "copy"

    def copying(self: CompiledProgram, state: Any, start: int, *others: int) -> Any:
        if start >= half and not copy.exists():
            shutil.copytree(folder, copy)
        return original(self, state, start, *others)

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(CompiledProgram, "__call__", copying)
        return train(config, num_seeds=1, devices=2, folder=folder, chunks=2)[1], copy


def measured(outcome: Any) -> dict[str, np.ndarray]:
    return {measure: np.asarray(values)[0] for measure, values in outcome.rows[0].items()}


def check_resume_is_bitwise(config: Config, expected: Any, copy: Path) -> None:
    assert loop.steps_done(copy) == config.num_train_steps // 2
    outcome = train(config, num_seeds=1, devices=2, folder=copy, resume=True, chunks=2)[1]
    same(outcome.state, expected.state)
    same(outcome.rows, expected.rows)


def test_groove_resumes_bitwise(groove_run: tuple[Any, Path]) -> None:
    check_resume_is_bitwise(GROOVE, *groove_run)


def test_groove_keeps_and_replays_levels(groove_run: tuple[Any, Path]) -> None:
    seen = measured(groove_run[0])
    assert not groove_run[0].failed[0].any()
    # Lives of six updates, two per meta-step, four agents of different ages: four ends in three meta-steps.
    np.testing.assert_allclose(seen["ended_lives"], 4 / 3, rtol=1e-6)
    assert (seen["replay_share"] > 0).any()
    assert (seen["replay_share"] < 1).all()
    kept = seen["kept_levels"][-1]
    assert 4 < kept <= 12
    scores, best = seen["score_quantile"][-1], seen["best_score"][-1]
    assert (np.diff(scores) >= 0).all()
    assert best[0] == scores[-1]
    assert np.isfinite(best).sum() == kept
    assert (seen["best_visits"][-1][: int(kept)] >= 1).all()
    assert np.isnan(seen["best_level"][0]).all()  # at the end only


def test_levels_are_the_same_by_their_numbers(groove_run: tuple[Any, Path]) -> None:
    """Those of the buffer are what `GridWorld-<mode>-<number>` is."""
    config = GROOVE.resolved()
    draw = jax.jit(curriculum.lottery(config.program().world, config))
    for number in measured(groove_run[0])["best_level"][-1][:2].astype(int).tolist():
        lot = draw(number)
        assert lot.lifetime == 6
        expected = grid_world.numbered("debug", number)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), lot.params, expected)


@pytest.mark.slow
def test_ta_lpg_resumes_bitwise(ta_lpg_run: tuple[Any, Path]) -> None:
    check_resume_is_bitwise(TA_LPG, *ta_lpg_run)


@pytest.mark.slow
def test_ta_lpg_searches(ta_lpg_run: tuple[Any, Path]) -> None:
    seen = measured(ta_lpg_run[0])
    assert (seen["best_fitness"] >= seen["fitness"]).all()
    assert (seen["tied_pairs"] >= 0).all()
    assert (seen["tied_pairs"] < 1).any()
    assert (seen["search_step"] > 0).all()


@pytest.mark.usefixtures("float64")
def test_the_first_step_of_adam_is_the_rate() -> None:
    """In every coordinate, whatever the fitness; fact 14 of the acceptance list."""
    settings = ObjectiveSearch(population=6, es_lr=0.03)
    strategy = Strategy(settings, jnp.zeros(5))
    state = strategy.init(jnp.zeros(5), settings)
    candidates = strategy.ask(jax.random.key(0), state, settings)
    after = strategy.tell(candidates, evolution.shaped(candidates[:, 0] ** 3, settings), state, settings)
    np.testing.assert_allclose(jnp.abs(after.mean), 0.03, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (GROOVE, {"buffer_size": 8}, "--buffer_size 8 must be at least 9"),
        (GROOVE, {"env_name": "GridWorld-debug-3"}, "--env_name GridWorld-<mode>, got GridWorld-debug-3"),
        (GROOVE, {"env_name": "GridWorld-rand_tiny", "score_function": "optimal_regret"}, "needs a tabular mode"),
        (GROOVE, {"lifetime": 1}, "--num_agent_updates 2 is above the shortest lifetime, 1"),
        (GROOVE, {"population": 8}, "--population 8 is for --agent_type ta_lpg, not groove"),
        (GROOVE, {"score_function": "best"}, "--score_function must be one of"),
        (GROOVE, {"agent_type": "lpg"}, "--buffer_size 12 is for --agent_type groove, not lpg"),
        (TA_LPG, {"population": 7}, "--population must be an even whole number from 2 to 1000000, got 7"),
        (TA_LPG, {"num_mini_batches": 3}, "--num_mini_batches 3 must divide the 8 agents of --population"),
        (TA_LPG, {"num_agents": 4}, "--num_agents 4 is for --agent_type lpg, groove, not ta_lpg"),
    ],
)
def test_settings_that_are_refused(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        replace(config, **changes).resolved()
    assert message in str(refused.value)


def test_a_fixed_set_may_be_small() -> None:
    """Smaller than the population: the study of the number of levels needs it (B17)."""
    config = replace(GROOVE, score_function="frozen", buffer_size=2).resolved()
    begin = alone(lambda key: groove.curriculum_of(config.program().world, config).begin(key))
    buffer, slots, numbers = begin(jax.random.key(0))
    np.testing.assert_array_equal(buffer.levels.number[slots], numbers)
    assert slots.shape == (4,)
