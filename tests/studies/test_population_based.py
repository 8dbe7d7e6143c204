"""Population-based training: selection and changes as in numpy, copies are their parents with keys of their own, the
best setting is found, on any number of devices, and a run that was stopped goes on to the bit."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from purejax_bilevel import load_policy
from purejax_bilevel.configuration import POSITIVE, at_least, configuration, static, traced
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Program, Stage, alone
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import populations
from purejax_bilevel.runtime import fingerprints, loop, outcomes
from purejax_bilevel.runtime.steps import plain_keys
from purejax_bilevel.studies import sweep_command
from purejax_bilevel.studies.intervals import Interval
from purejax_bilevel.studies.plan import SweptAgent, make_agents
from purejax_bilevel.studies.population_based import PopulationBased, Selection, chosen_parents, explored
from purejax_bilevel.studies.study import parse
from tests.programs.programs import killed_after

pytestmark = pytest.mark.usefixtures("compiled_once")

DRIFT, FAILS_ABOVE = 0.1, 1.9


@configuration
class Config:
    """Something drifts, and a rate says how much of it is made good in each step: the rate alone decides, 1 is best."""

    lr: float = traced(0.1, "learning rate", POSITIVE)
    noise: float = traced(1e-3, "noise", POSITIVE)
    copies: int = traced(1, "a whole number", at_least(1))
    num_train_steps: int = static(40, "steps", at_least(1))
    eval_frequency: int = static(4, "steps between rows", at_least(0))
    warm_up: int = static(0, "steps without learning", at_least(0))

    def program(self) -> "Tracking":
        return Tracking(self)


class State(flax.struct.PyTreeNode):
    key: jax.Array
    more: jax.Array  # keys [2]
    weight: jax.Array


class Tracking(Program):
    headline = "loss"
    artefact_kind = "weight"
    measures = (
        Measure("loss", "squared distance", better="lower"),
        Measure("moment", "mean number of the steps"),
        Measure("final_loss", "last squared distance", better="lower", dims=("episode",), when="end"),
    )

    def __init__(self, config: Config):
        update, collect = self.update, self.collect
        self.stages = (
            Stage(config.num_train_steps, config.eval_frequency, update, self.evaluate, "one", config.warm_up, collect),
        )

    def init(self, key: jax.Array, config: Config, shared: tuple) -> State:
        return State(key, jax.random.split(jax.random.fold_in(key, 7), 2), jnp.ones(()))

    def update(self, state: State, config: Config, t: jax.Array, shared: tuple) -> tuple[State, dict]:
        noise = config.noise * jax.random.normal(jax.random.fold_in(state.key, t))
        step = config.lr * state.weight - DRIFT + noise
        weight = jnp.where(config.lr > FAILS_ABOVE, jnp.nan, state.weight - step)
        return state.replace(weight=weight), {"moment": (t.astype(float), jnp.ones(()))}

    def collect(self, state: State, config: Config, t: jax.Array, shared: tuple) -> tuple[State, dict]:
        return state, {}

    def evaluate(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: tuple) -> dict:
        loss = (state.weight - DRIFT) ** 2 + 1e-6 * jax.random.uniform(jax.random.fold_in(state.key, 10_000 + t))
        return {"loss": loss, "final_loss": jnp.where(is_last, loss, jnp.nan)[None]}

    def artefact(self, state: State) -> jax.Array:
        return state.weight

    def is_finite(self, state: State) -> jax.Array:
        return jnp.abs(state.weight) < 100


PLACE = f"{__name__}:Config"
SWEEP: dict[str, Any] = {
    "program": PLACE,
    "agents": ["descent"],
    "search": {"method": "pbt", "population": 8, "interval": 4, "space": {"lr": [1e-3, 20.0]}},
    "seeds": 2,
}


def planned(**changes: Any) -> SweptAgent:
    (agent,) = make_agents(parse({**SWEEP, **changes}))
    return agent


def trained(num_devices: int = 1, seeds: int = 1, **options: Any) -> outcomes.Outcome:
    return loop.train(planned(seeds=seeds).parts(), loop.RunOptions(quiet=True, devices=num_devices, **options))


# --- what happens to a population -------------------------------------------------------------------------------------


def parents_in_numpy(drawn: np.ndarray, fitness: np.ndarray, count: int) -> list[int]:
    """Truncation selection, individual by individual."""
    order = np.lexsort((np.arange(len(fitness)), np.where(np.isnan(fitness), np.inf, -fitness))).tolist()
    worst = set(order[-count:]) | set(np.flatnonzero(np.isnan(fitness)).tolist())
    found = []
    for i in range(len(fitness)):
        parent = order[drawn[i]]
        is_better = np.isnan(fitness[i]) or fitness[parent] > fitness[i]
        found.append(parent if i in worst and is_better and not np.isnan(fitness[parent]) else i)
    return found


@pytest.mark.parametrize(("population", "fraction", "count"), [(8, 0.2, 2), (4, 0.2, 1), (16, 0.2, 3), (10, 0.5, 5)])
def test_the_worst_go_on_from_one_of_the_best(population: int, fraction: float, count: int):
    numbers = np.random.default_rng(population)
    choose = jax.jit(functools.partial(chosen_parents, fraction=fraction))
    copied = 0
    for case in range(8):
        fitness = numbers.normal(size=population).astype(np.float32)
        fitness[numbers.random(population) < (0, 0.3, 0.9, 1)[case % 4]] = np.nan
        if case >= 4:  # equal ones are no better: nobody is copied where all are
            fitness = np.round(0.01 * fitness if case == 4 else fitness)
        alive = int(np.isfinite(fitness).sum())
        drawn = np.asarray(jax.random.randint(jax.random.key(case), (population,), 0, min(max(alive, 1), count)))
        parents = choose(jax.random.key(case), fitness)
        assert parents.tolist() == parents_in_numpy(drawn, fitness, count)
        copied += int((parents != np.arange(population)).sum())
    assert copied > 6


def test_settings_are_multiplied_or_drawn_anew_within_their_space():
    space = (Interval("lr", 1e-3, 1.0), Interval("tau", -1.0, 1.0, "linear"))
    selection = Selection(space, 4000, factors=(0.5, 3.0), resample=0.25)
    before = {"lr": jnp.full(4000, 0.5), "tau": jnp.linspace(-0.1, 0.3, 4000)}
    after = jax.jit(functools.partial(explored, selection))(jax.random.key(0), before)
    for interval in space:
        old, new = np.asarray(before[interval.name]), np.asarray(after[interval.name])
        moved = [np.isclose(new, np.clip(factor * old, interval.low, interval.high)) for factor in (0.5, 3.0)]
        assert [round(found.mean(), 1) for found in moved] == [0.4, 0.4]  # 0.75 / 2
        fresh = new[~(moved[0] | moved[1])]
        positions = [interval.position(float(value)) for value in fresh]
        np.testing.assert_allclose(np.quantile(positions, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.06)
    same = np.isclose(after["lr"], 1.0) == np.isclose(after["tau"], np.clip(3 * before["tau"], -1, 1))
    assert 0.4 < same.mean() < 0.7  # settings change independently


@jax.debug_key_reuse(False)  # `alone` moves the first dimension of keys, which counts as their use
def test_copies_are_their_parents_with_keys_of_their_own():
    config = Config(warm_up=4)
    program = PopulationBased(config.program(), config, Selection((Interval("lr", 1e-3, 1.0),), 6, 4, fraction=0.34))
    config = jax.tree.map(jnp.asarray, config)
    state = alone(program.init)(jax.random.key(1), config, ())
    fitness = jnp.array([3.0, jnp.nan, 5.0, 1.0, 4.0, jnp.nan])
    state = state.replace(fitness=fitness, inner=state.inner.replace(weight=jnp.arange(6.0)))
    (stage,) = program.stages
    block = functools.partial(stage.around, lambda one, own, sums: (one, sums))
    around = jax.jit(lambda state, *rest: plain_keys(alone(block)(state, *rest)))
    for early in (0, 4, 9):  # learning has not begun, or it is not the time
        jax.tree.map(np.testing.assert_array_equal, around(state, config, early, early + 1, ()), plain_keys(state))
    after = around(state, config, 8, 9, ())
    parents = after.parents.tolist()
    assert [i for i, parent in enumerate(parents) if parent != i] == [1, 5]
    assert {parents[1], parents[5]} <= {2, 4}
    np.testing.assert_array_equal(after.inner.weight, parents)
    copies, rates = np.array([1, 5]), (state.settings["lr"], after.settings["lr"])
    assert (rates[1][copies] != rates[0][copies]).all()
    np.testing.assert_array_equal(np.delete(rates[1], copies), np.delete(rates[0], copies))
    before, now = plain_keys(state.inner.key).tolist(), after.inner.key.tolist()
    more = after.inner.more.reshape(-1, 2).tolist()
    for i in range(6):
        assert (now[i] == before[i]) == (i not in copies)
    assert len({*map(tuple, [*before, *now, *more])}) == 6 + 2 + 12  # no two streams are the same
    # At the end of a block all are tried, by random numbers of their own; whoever has diverged counts as failed.
    weights = jnp.array([3.0, -2.0, 200.0, jnp.nan, DRIFT, 0.0])
    tried = around(state.replace(inner=state.inner.replace(weight=weights)), config, 11, 12, ())
    squares = [2.9**2, 2.1**2, np.nan, np.nan, 0.0, 0.1**2]
    np.testing.assert_allclose(-tried.fitness, squares, rtol=1e-3, atol=1e-6)
    assert tried.best == 4
    own_noise = 1e-6 * jax.random.uniform(jax.random.fold_in(state.inner.key[4], 10_011))
    assert 0 < -tried.fitness[4] != own_noise


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_device() -> outcomes.Outcome:
    return trained()


def test_the_best_rate_is_found(one_device: outcomes.Outcome):
    (rows,) = one_device.rows
    rates, losses = rows["population_lr"][0], rows["population_loss"][0]
    first, unchanged = rates[0].astype(float), np.ones(8)
    assert first.max() > FAILS_ABOVE > first.min()
    for _ in range(40):  # where each would end with its first rate
        unchanged = (1 - first) * unchanged + DRIFT
    unchanged = np.where(first > FAILS_ABOVE, np.nan, (unchanged - DRIFT) ** 2)
    assert rows["loss"][0, -1] < 0.1 * np.nanmin(unchanged) < 0.01 * np.nanmean(unchanged)
    assert abs(np.median(np.log10(rates[-1]))) < 0.2
    assert np.isnan(losses[0]).any()
    assert not one_device.failed.pop().any()
    best = rows["best_individual"][0]
    np.testing.assert_array_equal(rows["loss"][0], losses[np.arange(10), best])
    np.testing.assert_array_equal(rows["final_loss"][0, -1, 0], losses[-1, best[-1]])
    np.testing.assert_allclose(rows["moment"][0], np.arange(0, 40, 4) + 1.5)  # since the last row


def test_lineage_and_schedules_agree(one_device: outcomes.Outcome):
    (rows,) = one_device.rows
    parents, rates = rows["parent"][0], rows["population_lr"][0]
    own = np.arange(8)
    np.testing.assert_array_equal(parents[0], own)
    for row in range(1, 10):
        np.testing.assert_array_equal(rates[row][parents[row] == own], rates[row - 1][parents[row] == own])
        copied = parents[row] != own
        assert np.isfinite(rows["population_loss"][0, row - 1][parents[row]][copied]).all()
    assert (parents != own).sum() >= 9


def test_a_population_is_the_same_on_any_number_of_devices(one_device: outcomes.Outcome):
    eight = trained(8)
    for name, array in one_device.rows[0].items():
        np.testing.assert_allclose(eight.rows[0][name], array, rtol=1e-4, atol=1e-6)


def test_a_killed_sweep_goes_on_to_the_bit_and_tells_lineage_and_schedules(tmp_path, monkeypatch):
    path, folder = tmp_path / "mine.yaml", tmp_path / "killed"
    path.write_text(yaml.safe_dump(SWEEP))
    words = ["--output_dir", str(tmp_path), "--name", folder.name, "--quiet", "--devices", "2"]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    with killed_after(5):
        sweep_command.main([str(path), *words, "--chunks", "13"])
    assert sweep_command.main(["--resume", str(folder), "--quiet", "--chunks", "7", "--devices", "2"]) == 0
    found, (whole,) = datasets.load(folder / "descent"), trained(2, seeds=2).rows
    for name in set(whole) - {"final_loss"}:
        np.testing.assert_array_equal(found[name], whole[name])
    np.testing.assert_array_equal(found.final_loss, whole["final_loss"][:, -1])
    assert found.population_lr.dims == found.parent.dims == ("seed", "step", "individual")
    assert found.population_lr.attrs["long_name"] == "learning rate of each individual"
    assert found.attrs["program"] == "Tracking"
    assert found.attrs["population_based"]["interval"] == 4
    assert "lr" not in found.attrs["config"]
    report = (folder / "report.md").read_text()
    assert "figures/populations-0.png" in report
    assert (folder / "figures" / "populations-0.png").stat().st_size > 10_000
    for member in range(2):
        end = populations.final_settings(populations.history(found, member))
        assert f"| {end['lr']:.3g} |" in report.split("## Populations")[1]


@pytest.mark.slow
def test_q_learning_in_populations_leaves_the_policy_of_the_best(tmp_path):
    sizes = {"num_train_steps": 400, "eval_frequency": 50, "init_steps": 100, "batch_size": 32, "capacity": 400}
    path = tmp_path / "mine.yaml"
    search = {
        "method": "pbt",
        "population": 4,
        "interval": 100,
        "space": {"inner_lr": [1e-4, 1e-2], "tau": [1e-3, 0.1]},
    }
    settings = {**sizes, "hidden_dim": 8, "eval_episodes": 2, "final_eval_episodes": 2}
    path.write_text(yaml.safe_dump({"program": "rl", "agents": ["sql"], "settings": settings, "search": search}))
    words = [str(path), "--output_dir", str(tmp_path), "--name", "sql", "--quiet", "--video", "--num_seeds", "2"]
    assert sweep_command.main(words) == 0
    found = datasets.load(tmp_path / "sql" / "sql")
    copied = (found.parent != np.arange(4)).any("individual").any("seed")
    assert copied.sel(step=copied).step.values.tolist() == [250, 350]  # rows after the exploits at 200 and 300
    assert np.isfinite(found.final_return).all()
    assert np.isfinite(found.q_loss[:, -1]).all()
    assert load_policy(f"{tmp_path}/sql/sql#1")(np.zeros(4)) in (0, 1)
    assert (tmp_path / "sql" / "sql" / "policy.gif").is_file()


# --- what does not go -------------------------------------------------------------------------------------------------

STAGES = {"program": "tests.programs.examples.stages:Config", "settings": {"rows": 1000}}
POPULATION = {"program": "tests.programs.examples.population:Config"}
ENSEMBLE = {"program": "ensemble", "agents": ["ensemble"], "settings": {"dataset": "sine"}}
REFUSED = {
    "programs of one stage, EnsembleThenPolicy has ensemble and policy": (STAGES, {"interval": 20}),
    "MetaRate has a population of its own": (POPULATION, {"interval": 20}),
    "takes no whole numbers, got copies": ({}, {"space": {"copies": [1, 4]}}),
    "must be a multiple of the 4 steps between evaluations .* got 6": ({}, {"interval": 6}),
    "must be a multiple of the 0 steps": ({"settings": {"eval_frequency": 0}}, {}),
    "interval 40 leaves no exploit: the first would be after step 40 of 40": ({}, {"interval": 40}),
    "interval 20 leaves no exploit": ({"settings": {"warm_up": 20}}, {"interval": 20}),
    "population must be at least 4 for pbt, got 3": ({}, {"population": 3}),
    "search: space has no entry 'num_train_steps'": ({}, {"space": {"num_train_steps": [1, 4]}}),
    "--search pbt has nothing to search for descent": ({}, {"space": {}}),
    "halving goes with the search methods grid and random, not with pbt": ({}, {"halving": 1}),
    "fraction must be above 0 and at most 0.5, got 0.6": ({}, {"fraction": 0.6}),
    "resample must be a probability from 0 to 1, got 2": ({}, {"resample": 2}),
    "factors must be numbers above 0": ({}, {"factors": [0, 2]}),
    "factors must be a finite number, got 'x'": ({}, {"factors": ["x"]}),
    "interval must be a whole number of at least 0, got 2.5": ({}, {"interval": 2.5}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_go_is_said(sentence: str):
    changes, search = REFUSED[sentence]
    with pytest.raises(UserError, match=sentence):
        planned(**changes, search={**SWEEP["search"], **search})


def test_other_settings_make_populations_of_their_own():
    agent = planned(axes=[{"grid": {"noise": [1e-3, 1e-2]}}, {"grid": {"lr": [0.1, 0.2]}}])
    assert agent.grid.shape == (2, 2)  # noise, seeds; lr is in the space
    (part,) = agent.parts()
    assert isinstance(part.program, PopulationBased)
    known = fingerprints.fingerprint([part])  # what wandb gets too
    assert "noise" in known
    assert "lr" not in known
    assert part.config.noise.tolist() == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2])
