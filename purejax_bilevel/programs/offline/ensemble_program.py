"""An ensemble of dynamics models alone, fitted to a dataset, as one pure program: what other runs may start from.

Outline of a run (every line inside one compiled loop):

    for each epoch, until no network has improved for `model_patience` of them:
        steps of AdamW, each network on batches of its own resample of the rows
        errors on held-out rows; each network is kept as it was when its own was lowest
    errors against uncertainties, coverage: on held-out rows, and on another dataset (`test_dataset`)

The artefact is a `fitting.Model`; `models.load` reads it.
"""

import functools
from pathlib import Path
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.configuration import changed, configuration, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Measure, Metrics, Program, Stage, Tree
from purejax_bilevel.programs.offline import calibration, ensemble, fitting, own_datasets, termination, toy
from purejax_bilevel.programs.offline.datasets import Dataset
from purejax_bilevel.programs.offline.ensemble import Normaliser, Transitions
from purejax_bilevel.programs.offline.fitting import Model
from purejax_bilevel.programs.offline.settings import Data, Fitting, TwoDatasets

# Named streams of random numbers of a member; a constant each, so that adding one moves no other.
INIT, RESAMPLE, EPOCH = range(3)

KIND = "dynamics ensemble"
REPORTED_ROWS = 1000  # most rows whose errors and uncertainties are kept


AGENTS = Agents(
    Agent,
    [Agent("ensemble", "no agent: an ensemble of dynamics models, fitted to a dataset", fitting.epoch, fitting.begin)],
)


@configuration
class Config(Fitting, TwoDatasets):
    """Settings of one training program; a traced field may hold several values, one per point of a grid."""

    agent_type: str = changed(Data, "agent_type", "ensemble", choices=AGENTS)
    dataset: str = changed(
        Data, "dataset", toy.NAME, "file of transitions: .npz, or D4RL's or Minari's .hdf5; sine: a toy without a file"
    )

    def program(self) -> "Ensemble":
        """The training program of this (resolved) configuration."""
        return Ensemble(self)

    @property
    def title(self) -> str:
        """Short name of the experiment."""
        return f"ensemble-{Path(self.dataset).stem}"

    def resolved(self) -> Self:
        """Checks everything.

        Raises:
            UserError: for a value that is not allowed, or a dataset that cannot be.
        """
        config = AGENTS.tuned(self)
        validate(config)
        dataset, test = dataset_of(config), test_dataset_of(config)
        fitting.split_of(config, len(dataset), config.dataset)
        terminals_of(config, dataset)
        if test is not None and (test.obs_dim, test.action_dim) != (dataset.obs_dim, dataset.action_dim):
            raise UserError(
                f"--test_dataset {config.test_dataset} has {test.obs_dim} numbers in observations and "
                f"{test.action_dim} in actions, --dataset {config.dataset} has {dataset.obs_dim} and "
                f"{dataset.action_dim}."
            )
        return config


def dataset_of(config: Data) -> Dataset:
    """The dataset of a configuration, read once.

    Raises:
        UserError: none is given, or it cannot be.
    """
    if not config.dataset:
        raise UserError("--dataset is needed: a file of transitions; --agent_type collect makes some.")
    found = own_datasets.load(config.dataset, config.action_bound)
    return found.subset(config.dataset_rows) if config.dataset_rows else found


def test_dataset_of(config: TwoDatasets) -> Dataset | None:
    """The other dataset of a configuration, if it has one."""
    return own_datasets.load(config.test_dataset, config.action_bound) if config.test_dataset else None


def terminals_of(config: Fitting, dataset: Dataset, environment: str = "") -> termination.Termination | None:
    """The rule that ends imagined episodes; None where the ensemble learns it.

    Args:
        config: of an ensemble.
        dataset: that it is fitted to.
        environment: where policies act; "": the dataset's.

    Raises:
        UserError: a rule is asked for and not known, or a trunk and there is nothing to learn it from.
    """
    asked, name = config.model_terminals, environment or dataset.environment
    rule, has_terminals = termination.of(name), bool(dataset.terminated.any())
    if asked == "rule" and rule is None:
        raise UserError(f"--model_terminals rule: when episodes of {name or 'this dataset'} end is not known.")
    if asked == "learned" and not has_terminals:
        raise UserError(f"--model_terminals learned: no row of {dataset.source} is terminal.")
    if asked == "learned" or (asked == "auto" and rule is None and has_terminals):
        return None
    return rule if asked in ("rule", "auto") and rule is not None else termination.never


class State(flax.struct.PyTreeNode):
    """Everything a member carries from epoch to epoch."""

    key: jax.Array
    fit: fitting.Fit


class Ensemble(Program[Config]):
    """The program: pure functions of a member's configuration, sharing the dataset.

    Args:
        config: resolved configuration; only its static fields matter here.
    """

    headline = "validation_error"
    step_unit = "epochs"
    figures = "purejax_bilevel.programs.offline.ensemble_figures"
    artefact_kind = KIND
    measures = (
        Measure("validation_error", "mean squared error on held-out rows, best networks", better="lower", tabled=True),
        Measure("current_error", "mean squared error on held-out rows, current networks", better="lower"),
        Measure("model_loss", "loss of the networks"),
        Measure("network_error", "lowest error of each network", better="lower", dims=("network",), when="end"),
        Measure(
            "rank_correlation", "rank correlation of error and uncertainty", dims=("source", "kind"), when="end",
            better="higher",
        ),
        Measure("coverage", "share of numbers inside intervals", dims=("source", "level"), when="end"),
        Measure("row_error", "error of the next observation", dims=("source", "row"), when="end", logged=False),
        Measure("row_uncertainty", "uncertainty", dims=("source", "kind", "row"), when="end", logged=False),
        Measure("row_reward", "predicted reward", dims=("network", "row"), when="end", logged=False),
        Measure("row_reward_std", "its standard deviation", dims=("network", "row"), when="end", logged=False),
    )  # fmt: skip

    def __init__(self, config: Config):
        self.data, self.test = dataset_of(config), test_dataset_of(config)
        learned = terminals_of(config, self.data) is None
        self.architecture = fitting.architecture_of(config, self.data.obs_dim, self.data.action_dim, learned)
        self.split = fitting.split_of(config, len(self.data), config.dataset)
        self.raw_inputs, self.steps = config.raw_inputs, fitting.epoch_steps(config, self.split)
        self.reported = min(REPORTED_ROWS, self.split.held_out, *(() if self.test is None else (len(self.test),)))
        done = lambda state: state.fit.is_over  # noqa: E731
        self.stages = (Stage(config.model_epochs, 1, self.update, self.evaluate, done=done, most_block_steps=1),)

    def shared(self) -> dict[str, np.ndarray]:
        """The rows, their order, mean and standard deviation; some rows of the other dataset."""
        found = dict(fitting.shared_rows(self.data, self.raw_inputs))
        return found if self.test is None else {**found, "test": self.test.rows}

    def init(self, key: jax.Array, config: Config, shared: Tree) -> State:
        """State of a member before its first epoch; the key becomes the member's own."""
        normaliser = Normaliser(shared["mean"], shared["std"])
        return State(key, fitting.begin(config, self.architecture, normaliser, jax.random.fold_in(key, INIT)))

    def update(self, state: State, config: Config, t: jax.Array, shared: Tree) -> tuple[State, Metrics]:
        """One epoch."""
        seed_key = jax.random.fold_in(state.key, RESAMPLE)
        draw = fitting.drawer(config, self.architecture, self.split, shared, seed_key)
        held_out = fitting.held_out_rows(shared, self.split, self.architecture.obs_dim)
        key = jax.random.fold_in(jax.random.fold_in(state.key, EPOCH), t)
        fit, loss = fitting.epoch(config, self.architecture, state.fit, draw, held_out, key, self.steps)
        one = jnp.ones(())
        return state.replace(fit=fit), {"model_loss": (loss, one), "current_error": (fit.errors.mean(), one)}

    def evaluate(self, state: State, config: Config, t: jax.Array, is_last: jax.Array, shared: Tree) -> dict:
        """Errors of the best networks; at the end calibration too, before that NaN."""
        measure = functools.partial(self._calibrated, fitting.fitted(state.fit), shared)
        nothing = lambda: jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))  # noqa: E731
        errors = {"validation_error": state.fit.best_errors.mean(), "network_error": state.fit.best_errors}
        return errors | jax.lax.cond(is_last, measure, nothing)

    def _calibrated(self, model: Model, shared: Tree) -> dict[str, jax.Array]:
        obs_dim = self.architecture.obs_dim
        sources = [fitting.held_out_rows(shared, self.split, obs_dim)]
        if self.test is not None:
            places = np.linspace(0, len(self.test) - 1, self.reported).astype(int)
            sources.append(fitting.transitions(shared["test"][places], obs_dim))
        found = [calibration.calibrate(self.architecture, model, rows) for rows in sources]
        shown = jax.tree.map(lambda column: column[: self.reported], sources[-1])
        return {
            "rank_correlation": jnp.stack([one.rank_correlation for one in found]),
            "coverage": jnp.stack([one.coverage for one in found]),
            "row_error": jnp.stack([one.error[: self.reported] for one in found]),
            "row_uncertainty": jnp.stack([one.uncertainty[:, : self.reported] for one in found]),
            **self._rewards(model, shown),
        }

    def _rewards(self, model: Model, rows: Transitions) -> dict[str, jax.Array]:
        prediction = ensemble.predict(self.architecture, model.networks, model.normaliser, rows.obs, rows.action)
        return {"row_reward": prediction.mean[..., -1], "row_reward_std": prediction.std[..., -1]}

    def artefact(self, state: State) -> Model:
        """The best networks, with what normalises their inputs and their ranks."""
        return fitting.fitted(state.fit)

    def is_finite(self, state: State) -> jax.Array:
        """Whether all parameters of a member are finite numbers."""
        leaves = jax.tree.leaves((state.fit.networks, state.fit.best))
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
