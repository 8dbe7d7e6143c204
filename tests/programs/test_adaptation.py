"""Settings that adapt themselves: hypergradients agree with finite differences and forward differentiation, settings go
where the answer is known, members begin with values of their own in one program, and a run goes on to the bit."""

from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from purejax_bilevel import RegressionConfig, run
from purejax_bilevel.agents import Agent
from purejax_bilevel.configuration import FRACTION, POSITIVE, at_least, configuration, replace, static, traced
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import batch_config, grid_of
from purejax_bilevel.program import Measure, Program, Stage
from purejax_bilevel.programs import adaptation
from purejax_bilevel.programs.control import agents, learning_ahead, q_learning, soft_actor_critic
from purejax_bilevel.programs.control.soft_actor_critic_agents import AGENTS as CONTINUOUS
from purejax_bilevel.results import schedules
from purejax_bilevel.runtime.devices import make_mesh
from purejax_bilevel.studies import command_line, sweep_command
from purejax_bilevel.studies.plan import make_agents
from purejax_bilevel.studies.study import parse
from tests.programs.programs import check_resume_is_bitwise, count_conds, train

pytestmark = pytest.mark.usefixtures("compiled_once")

CURVATURE, DRIFT = 4.0, 0.3


@configuration
class Config(adaptation.Adaptation):
    """Gradient descent with momentum on a parabola whose weight drifts: a rate of 1 / CURVATURE ends a step at 0."""

    lr: float = traced(0.1, "learning rate (default: none)", POSITIVE)
    momentum: float = traced(0.1, "share of the last step", FRACTION)
    num_train_steps: int = static(60, "steps", at_least(1))
    eval_frequency: int = static(20, "steps between rows", at_least(0))

    def program(self) -> Program:
        return adaptation.adapted(Descent(self), self)


class State(flax.struct.PyTreeNode):
    key: jax.Array
    weight: jax.Array
    step: jax.Array


def descended(config: Any, state: State) -> State:
    step = config.momentum * state.step - config.lr * CURVATURE * state.weight
    return state.replace(weight=state.weight + step, step=step)


def loss_of(state: State) -> jax.Array:
    return 0.5 * CURVATURE * state.weight**2


class Descent(Program):
    headline = "loss"
    measures = (Measure("loss", "half the squared distance", better="lower"),)

    def __init__(self, config: Config):
        update, collect = self.update, self.collect
        self.stages = (
            Stage(config.num_train_steps, config.eval_frequency, update, self.evaluate, warm_up=12, collect=collect),
        )

    def init(self, key: jax.Array, config: Config, shared: tuple = ()) -> State:
        return State(key, jnp.ones(()), jnp.zeros(()))

    def update(self, state: State, config: Config, t: jax.Array, shared: tuple = ()) -> tuple[State, dict]:
        noise = jax.random.uniform(jax.random.fold_in(state.key, t))
        state = descended(config, state)
        return state.replace(weight=state.weight + DRIFT * (0.5 + noise)), {}

    def collect(self, state: State, config: Config, t: jax.Array, shared: tuple = ()) -> tuple[State, dict]:
        return state, {}

    def evaluate(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: tuple = ()) -> dict:
        return {"loss": loss_of(state)}

    def lookahead(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> adaptation.Lookahead:
        del key
        return adaptation.Lookahead(state, lambda own, learned, number: descended(own, learned), loss_of)


# --- hypergradients ---------------------------------------------------------------------------------------------------


def three_ways(program: Any, state: Any, config: Any, t: int) -> tuple[dict[str, Any], ...]:
    """The hypergradient by the program, by forward differentiation and by central differences."""
    ahead = program.inner.lookahead(state.inner, config, jnp.int32(t), jax.random.fold_in(state.key, t))

    def loss(positions: dict[str, jax.Array]) -> jax.Array:
        learned = ahead.start
        for number in range(config.adapt_steps):
            learned = ahead.update(replace(config, **program.settings(positions)), learned, jnp.int32(number))
        return ahead.loss(learned)

    at = state.positions
    value, reverse = compiled(lambda state: program.hypergradient(state, config, jnp.int32(t)), state)(state)
    at_ends = compiled(loss, at)
    np.testing.assert_allclose(value, at_ends(at), rtol=1e-9)
    shifted = lambda name, shift: at_ends({**at, name: at[name] + shift})  # noqa: E731
    differences = {name: (shifted(name, 1e-5) - shifted(name, -1e-5)) / 2e-5 for name in at}
    return reverse, compiled(jax.jacfwd(loss), at)(at), differences


def compiled(function: Any, argument: Any) -> Any:
    return jax.jit(function).lower(argument).compile()


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_hypergradient_of_a_parabola_is_known(float64, num_steps: int):
    config = Config(adapt="lr momentum", adapt_steps=num_steps).resolved()
    program = config.program()
    state = program.init(jax.random.key(0), config)
    state = state.replace(inner=state.inner.replace(weight=jnp.float64(0.7), step=jnp.float64(-0.2)))
    found, *others = three_ways(program, state, config, 5)
    for name, value in found.items():
        np.testing.assert_allclose([other[name] for other in others], value, rtol=1e-6)
    if num_steps == 1:
        weight = 0.7 + 0.1 * -0.2 - 0.1 * CURVATURE * 0.7
        slopes = {"lr": -0.1 * CURVATURE * 0.7, "momentum": 0.1 * 0.9 * -0.2}  # of the weight, in logarithm and logit
        for name, slope in slopes.items():
            np.testing.assert_allclose(found[name], CURVATURE * weight * slope, rtol=1e-9)


class NoisyDescent(Descent):
    """What is looked ahead on is drawn, as a batch would be: the curvature."""

    def lookahead(self, state: State, config: Config, t: jax.Array, key: jax.Array) -> adaptation.Lookahead:
        curvature = jax.random.uniform(key)
        return adaptation.Lookahead(
            state, lambda own, learned, number: descended(own, learned), lambda learned: curvature * learned.weight**2
        )


def test_each_lookahead_draws_anew_from_the_members_seed():
    config = Config(adapt="lr").resolved()
    program = adaptation.adapted(NoisyDescent(config), config)
    at = jax.jit(lambda seed, t: program.hypergradient(program.init(jax.random.key(seed), config), config, t)[1]["lr"])
    found = [float(at(seed, t)) for seed in (0, 1) for t in (5, 6, 7)]
    assert len(set(found)) == len(found)
    assert at(0, 5) == found[0]


SMALL: dict[str, Any] = {
    "num_train_steps": 60,
    "init_steps": 16,
    "batch_size": 16,
    "capacity": 40,
    "hidden_dim": 5,
    "model_hidden_dim": 4,
    "eval_frequency": 20,
    "eval_episodes": 2,
    "final_eval_episodes": 3,
}
LEARNING: dict[str, dict[str, dict[str, Any]]] = {  # with which all that an agent can adapt reaches the loss
    "rl": {
        "omd": {"warm_opt": True, "smoothing": "ema"},
        "funcbo": {"warm_opt": True, "smoothing": "window", "smoothing_window": 4},
        "funcbo_reward_only": {"warm_opt": True, "smoothing": "ema", "num_dual_Q_steps": 1},
        "mle": {"prob_model": True},
    },
    "continuous": {
        "omd": {"warm_opt": True, "num_Q_steps": 1, "smoothing": "ema"},  # with more steps tau reaches it at once
        "funcbo": {"warm_opt": True, "smoothing": "window", "smoothing_window": 4},
    },
}


def learned(config: Any, steps: int) -> tuple[Any, Any, Any]:
    """A member alone after some steps: its program, its configuration and its state."""
    config = config.resolved()
    config = batch_config(config, grid_of(config, (0,)))
    as_wide = lambda leaf: jnp.asarray(leaf[0], float if leaf.dtype.kind == "f" else int)  # noqa: E731
    config = jax.tree.map(as_wide, config)
    program = config.program()
    (stage,) = program.stages

    @jax.jit
    def run_on() -> Any:
        step = lambda function: lambda state, t: (function(state, config, t, ())[0], None)  # noqa: E731
        state = program.init(jax.random.key(0), config)
        state, _ = jax.lax.scan(step(stage.collect), state, jnp.arange(stage.warm_up))
        return jax.lax.scan(step(stage.update), state, jnp.arange(stage.warm_up, steps))[0]

    return program, config, run_on()


PROGRAMS = {"rl": (q_learning.Config, agents.AGENTS), "continuous": (soft_actor_critic.Config, CONTINUOUS)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in PROGRAMS for name in PROGRAMS[kind][1]])
def test_hypergradients_of_an_agent_agree_and_reach_the_loss_as_soon_as_it_says(
    float64, usual_compilation, monkeypatch, kind: str, name: str
):
    # Differences need a smooth function, and Adam's step bends where a gradient is as small as its constants.
    monkeypatch.setattr(learning_ahead, "EPS_ROOT", 1e-6)
    config_class, registry = PROGRAMS[kind]
    reach = registry[name].adaptable
    own = {setting: value for setting, value in {"beta": 0.3, "alpha": 0.1}.items() if setting in reach}
    config = config_class(agent_type=name, adapt=" ".join(reach), adapt_steps=2, **own, **SMALL)
    program, config, state = learned(replace(config, **LEARNING[kind].get(name, {})), 40)
    reverse, forward, differences = three_ways(program, state, config, 40)
    largest = max(map(abs, reverse.values()))
    for setting, value in reverse.items():
        assert abs(value) > 1e-12, setting
        np.testing.assert_allclose(forward[setting], value, rtol=1e-6, err_msg=setting)
        if kind == "continuous" and setting in ("lr", "beta"):
            continue  # of the model, at whose observations the policy's action counts as given: no whole derivative
        np.testing.assert_allclose(differences[setting], value, rtol=2e-3, atol=1e-5 * largest, err_msg=setting)
    soon = adaptation.Adapted(program.inner, replace(config, adapt_steps=1))
    _, gradient = jax.jit(lambda state: soon.hypergradient(state, replace(config, adapt_steps=1), jnp.int32(40)))(state)
    assert {setting for setting, value in gradient.items() if value != 0} == {
        setting for setting, steps in reach.items() if steps == 1
    }


# --- runs -------------------------------------------------------------------------------------------------------------

ADAPTING = Config(adapt="lr", adapt_lr=0.1, lr=(0.02, 0.2, 0.45), momentum=1e-3, adapt_every=2)


def test_rates_go_to_where_the_answer_is_known_whatever_they_began_with():
    """Also: members differ in first values within one program."""
    config = replace(ADAPTING, num_train_steps=400, eval_frequency=100)
    outcome = train(config, 1)[1]
    assert outcome.num_traces == 1
    (rows,) = outcome.rows
    np.testing.assert_allclose(rows["adapted_lr"][:, -1], 1 / CURVATURE, rtol=0.15)
    assert (
        np.abs(np.log(rows["adapted_lr"][:, 0] * CURVATURE)) < np.abs(np.log(np.array(config.lr) * CURVATURE))
    ).all()
    assert np.isfinite(rows["hypergradient_lr"]).all()


@pytest.mark.slow
def test_settings_that_do_not_move_change_nothing():
    """The program's own random numbers are those that it has alone."""
    still = train(replace(ADAPTING, adapt_lr=1e-30), 1)[1].rows[0]
    alone = train(replace(ADAPTING, adapt="", adapt_lr=0.01, adapt_every=1), 1)[1].rows[0]
    np.testing.assert_allclose(still["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(still["adapted_lr"], np.array(ADAPTING.lr)[:, None] * np.ones(3), rtol=1e-6)


def test_a_broken_run_goes_on_to_the_bit_on_another_number_of_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_resume_is_bitwise(ADAPTING, tmp_path, monkeypatch)


def test_an_overflow_does_not_end_the_adaptation():
    config = Config(adapt="lr", lr=0.2).resolved()
    program = config.program()
    state = program.init(jax.random.key(0), config)
    broken = state.replace(inner=state.inner.replace(weight=jnp.float32(3e30)))
    moved, metrics = jax.jit(lambda state: program.update(state, config, jnp.int32(12)))(broken)
    assert metrics["hypergradient_lr"] == (0, 0)
    assert moved.positions == state.positions


def test_steps_without_a_change_of_settings_have_no_branch_on_an_accelerator():
    conds = [count_conds(replace(ADAPTING, adapt_every=every), 1, None, make_mesh(1)) for every in (1, 2)]
    (stage,) = ADAPTING.program().stages
    assert [count for count, _ in stage.cycle] == [1, 1]
    assert conds[1] == conds[0] + 1  # on a CPU


@pytest.fixture(scope="module")
def sql_adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("sql")
    config = q_learning.Config(agent_type="sql", adapt="inner_lr discount", inner_lr=(1e-3, 1e-2), **SMALL)
    return folder, run(config, num_seeds=2, folder=folder, quiet=True)


@pytest.mark.slow
def test_results_tell_the_schedules(sql_adapted: tuple[Path, Any]):
    folder, found = sql_adapted
    assert found.attrs["program"] == "ModelBased"
    assert found.adapted_inner_lr.dims == ("inner_lr", "seed", "step")
    assert found.adapted_discount.attrs["long_name"] == "discount factor"
    assert found.hypergradient_discount.attrs["long_name"].endswith("in the logit of discount")
    moved = np.abs(np.log(found.adapted_inner_lr / found.inner_lr))
    assert (moved.isel(step=0) > 0).all()
    assert (moved < 0.5).all()  # 44 steps of Adam, of 0.01 or a little more
    assert ((found.adapted_discount > 0.98) & (found.adapted_discount < 0.995)).all()
    assert (folder / schedules.FILE_NAME).stat().st_size > 10_000
    assert np.isfinite(found.final_return).all()


@pytest.mark.slow
def test_a_sweep_reports_where_settings_went(tmp_path: Path):
    settings = {**SMALL, "adapt": "inner_lr discount", "adapt_every": 3}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"program": "rl", "agents": ["sql", "mle"], "settings": settings, "seeds": 2}))
    assert sweep_command.main([str(path), "--output_dir", str(tmp_path), "--name", "both", "--quiet"]) == 0
    report = (tmp_path / "both" / "report.md").read_text().split("## Settings that adapted themselves")[1]
    assert report.count("| inner_lr |") == 2
    assert (tmp_path / "both" / "figures" / "schedules-1.png").is_file()


# --- what does not go -------------------------------------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "--adapt lrr: there is no such setting; sql can adapt inner_lr, discount": {"adapt": "inner_lr lrr"},
    "--adapt lr: its validation loss has no derivative in it": {"adapt": "lr"},
    "--adapt names alpha twice": {"adapt": "alpha discount alpha"},
    "--adapt tau needs --adapt_steps 2 or more with sql": {"adapt": "tau"},
    "--adapt alpha: with --hard there is no temperature": {"adapt": "alpha", "hard": True},
    "--adapt discount: its first value must lie between 0 and 1, got 1.0": {
        "adapt": "discount",
        "discount": (0.9, 1.0),
    },
    "--adapt_every needs --adapt: ": {"adapt_every": 3},
    "--adapt_steps must be a whole number of at least 1, got 0": {"adapt": "alpha", "adapt_steps": 0},
    "--adapt discount: the only step of a fresh Adam .* give --warm_opt or": {"agent_type": "omd", "adapt": "discount"},
    "--adapt beta: without --smoothing": {"agent_type": "omd", "adapt": "beta", "adapt_steps": 2, "warm_opt": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_adapted_is_refused(message: str):
    with pytest.raises(UserError, match=message):
        q_learning.Config(**{"agent_type": "sql", **REFUSED[message]}).resolved()


def test_an_agent_that_names_nothing_can_adapt_nothing():
    mine = Agent("mine", "of my own", step=lambda: None, init=lambda: None)
    with pytest.raises(UserError, match="the agent mine has no settings that hypergradients could adapt"):
        adaptation.check(q_learning.Config(adapt="lr"), mine, {})


def test_populations_and_hypergradients_do_not_change_the_same_setting():
    search = {"method": "pbt", "population": 4, "space": {"lr": [0.01, 1.0], "momentum": [0.1, 0.5]}}
    settings = {"adapt": "momentum lr"}
    study = parse({"program": f"{__name__}:Config", "agents": ["x"], "settings": settings, "search": search})
    with pytest.raises(UserError, match="pbt and --adapt both change lr, momentum"):
        make_agents(study)


def test_the_command_line_takes_several_names():
    for words in (["--adapt", "inner_lr", "discount"], ["--adapt=inner_lr discount"], ["--adapt", "inner_lr discount"]):
        _, config = command_line.parse(q_learning.Config, "", ["--agent_type", "sql", *words, "--quiet"])
        assert config.adapt == "inner_lr discount"
    with pytest.raises(UserError, match="--adapt needs at least one name"):
        command_line.parse(q_learning.Config, "", ["--adapt", "--quiet"])
    with pytest.raises(UserError, match="--adapt lr: there are no hypergradients of the settings of this program"):
        command_line.parse(RegressionConfig, "", ["--adapt", "lr"])
