"""Datasets of transitions: what one holds, what is checked, and what a normalised score is.

    dataset = load("runs/pendulum/medium.npz")    # dataset_files.py: also D4RL's and Minari's HDF5 files
    dataset.rows                                  # what programs share with all members
    dataset.score(returns)                        # 0: uniform actions, 100: the expert

Rows are in the order in which they were seen, episode after episode. `next_obs` is the observation before any reset,
`terminated` says that the episode ended there by itself and `timeout` that it was cut, by a time limit or the end of
the recording: values go on after a cut. Actions are in [-1, 1], as everywhere in this project.
Source of the layout and of the score: D4RL, Fu et al. 2020 (arXiv 2004.07219).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from purejax_bilevel.configuration import warn
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import counted
from purejax_bilevel.programs.offline import termination

# D4RL's lowest and highest returns, of MuJoCo's physics alone: Brax's tasks of these names have other returns.
D4RL_SCORES = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
}
D4RL_KINDS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
ARRAYS = ("obs", "action", "reward", "next_obs", "terminated", "timeout")  # of a dataset
ACTION_TOLERANCE = 1e-4  # how far actions may be outside [-1, 1] by rounding
TERMINAL_TOLERANCE = 1e-3  # share of rows that may differ from the rule of the environment, by rounding


@dataclasses.dataclass(frozen=True)
class Scores:
    """Returns that stand for 0 and 100, with their standard errors (NaN where they are not known)."""

    minimum: float
    maximum: float
    minimum_error: float = float("nan")
    maximum_error: float = float("nan")

    def normalised(self, returns: Any) -> Any:
        """100 (return - minimum) / (maximum - minimum)."""
        return 100.0 * (returns - self.minimum) / (self.maximum - self.minimum)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Transitions in the order in which they were seen; numpy arrays.

    Args:
        obs: `[rows, obs]`, 32-bit floats, as all but the last two.
        action: `[rows, action]` in [-1, 1].
        reward: `[rows]`.
        next_obs: `[rows, obs]`, before any reset.
        terminated: `[rows]` booleans.
        timeout: `[rows]` booleans.
        environment: name, "" where the file does not say.
        scores: returns that stand for 0 and 100; None: not known.
        about: what else the file says: who acted, how long it was trained, seed.
        source: file that it is from.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    terminated: np.ndarray
    timeout: np.ndarray
    environment: str = ""
    scores: Scores | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def obs_dim(self) -> int:
        return self.obs.shape[1]

    @property
    def action_dim(self) -> int:
        return self.action.shape[1]

    @property
    def ends(self) -> np.ndarray:
        """After which rows an episode ends or is cut, `[rows]` booleans; where rows do not join counts too."""
        jump = np.ones(len(self), bool)
        jump[:-1] = np.abs(self.obs[1:] - self.next_obs[:-1]).max(1) > 1e-4 * (1 + np.abs(self.obs[1:]).max(1))
        return self.terminated | self.timeout | jump

    def returns(self) -> np.ndarray:
        """Sums of rewards `[episodes]`; the last episode may have been cut."""
        return np.add.reduceat(self.reward, self._starts(), dtype=np.float64)

    def lengths(self) -> np.ndarray:
        """Rows of each episode, `[episodes]`."""
        return np.diff([*self._starts(), len(self)])

    def _starts(self) -> np.ndarray:
        return np.concatenate([[0], 1 + np.flatnonzero(self.ends[:-1])])

    def score(self, returns: Any) -> Any:
        """Normalised scores of returns: 0 for uniform actions, 100 for the expert.

        Raises:
            UserError: the file does not say what these have as return.
        """
        if self.scores is None:
            raise UserError(f"{self.source or 'the dataset'} has no reference scores: give it ref_min and ref_max.")
        return self.scores.normalised(returns)

    @functools.cached_property  # one object: programs that share it must return the same
    def rows(self) -> np.ndarray:
        """All transitions in one array `[rows, 2 obs + action + 2]`: obs, next_obs, action, reward, terminated.

        These are the columns of `purejax_bilevel.replay`, 32-bit floats.
        """
        scalars = np.stack([self.reward, self.terminated], axis=1)
        return np.concatenate([self.obs, self.next_obs, self.action, scalars], axis=1, dtype=np.float32)

    def __getitem__(self, rows: slice | np.ndarray) -> "Dataset":
        """Some of the rows; where an episode is cut, its last row gets a timeout."""
        found = self._with({name: getattr(self, name)[rows] for name in ARRAYS})
        return found._with({"timeout": found.ends & ~found.terminated})

    def joined(self, other: "Dataset") -> "Dataset":
        """The rows of another dataset after these."""
        return self._with({name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in ARRAYS})

    def _with(self, arrays: Mapping[str, Any]) -> "Dataset":
        return dataclasses.replace(self, **arrays)

    def subset(self, count: int, seed: int = 0) -> "Dataset":
        """`count` rows drawn without replacement, in their order; all of them if there are no more."""
        if count >= len(self):
            return self
        return self[np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))]


def d4rl_scores(name: str) -> Scores | None:
    """What D4RL divides returns by, for a dataset of its name (`hopper-medium-v2`); None for others."""
    family, _, rest = name.lower().partition("-")
    kind, _, version = rest.rpartition("-")
    known = family in D4RL_SCORES and kind in D4RL_KINDS and version[:1] == "v" and version[1:].isdecimal()
    return Scores(*D4RL_SCORES[family]) if known else None


# --- checks -----------------------------------------------------------------------------------------------------------

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def checked(arrays: Mapping[str, Any], source: str, action_bound: float = 1.0, **about: Any) -> Dataset:
    """A dataset of arrays as files name them.

    Args:
        arrays: those of `COLUMNS`, `[rows, ...]`.
        source: where they are from, for messages.
        action_bound: what actions are divided by.
        about: further arguments of `Dataset`.

    Raises:
        UserError: naming the array, the row and what is wrong with it.
    """
    numbers = {name: _real(arrays[name], name, source) for name in COLUMNS}
    for name in ("rewards", "terminals", "timeouts"):
        numbers[name] = numbers[name].reshape(len(numbers[name]), -1)
        if numbers[name].shape[1] != 1:
            raise UserError(f"{source}: {name} must be one number per row, got {numbers[name].shape[1]}.")
        numbers[name] = numbers[name][:, 0]
    _check_shapes(numbers, source)
    _check_numbers(numbers, source)
    action = numbers["actions"] / np.float32(action_bound)
    _check_actions(action, source)
    dataset = Dataset(
        obs=numbers["observations"],
        action=np.clip(action, -1.0, 1.0),
        reward=numbers["rewards"],
        next_obs=numbers["next_observations"],
        terminated=numbers["terminals"] > 0,
        timeout=(numbers["timeouts"] > 0) & ~(numbers["terminals"] > 0),
        source=source,
        **about,
    )
    _check_terminals(dataset)
    return dataset


def _real(array: Any, name: str, source: str) -> np.ndarray:
    found = np.asarray(array)
    if found.dtype.kind not in "biuf" or not found.ndim:
        raise UserError(f"{source}: {name} must be an array of real numbers, got {found.dtype}{list(found.shape)}.")
    with np.errstate(over="ignore"):  # what is not finite then is refused
        return found.astype(np.float32)


def _check_shapes(numbers: Mapping[str, np.ndarray], source: str) -> None:
    rows = len(numbers["observations"])
    for name, array in numbers.items():
        if len(array) != rows:
            raise UserError(f"{source}: {name} has {counted(len(array), 'row')}, observations has {rows}.")
        if array.ndim != (1 if name in ("rewards", "terminals", "timeouts") else 2):
            raise UserError(f"{source}: {name} must be [rows, numbers], got {list(array.shape)}.")
    widths = [numbers[name].shape[1] for name in ("observations", "next_observations")]
    if widths[0] != widths[1]:
        raise UserError(f"{source}: observations have {widths[0]} numbers, next_observations {widths[1]}.")
    if rows < 2 or not widths[0] or not numbers["actions"].shape[1]:
        raise UserError(f"{source}: a dataset needs 2 rows, observations and actions, got {counted(rows, 'row')}.")


def _check_numbers(numbers: Mapping[str, np.ndarray], source: str) -> None:
    for name, array in numbers.items():
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(1)
        if bad.any():
            rows = f"{bad.sum()} row{'s' if bad.sum() > 1 else ''}"
            raise UserError(f"{source}: {name} has numbers that are not finite in {rows}, first in row {bad.argmax()}.")
    for name in ("terminals", "timeouts"):
        if not np.isin(numbers[name], (0, 1)).all():
            raise UserError(f"{source}: {name} must be 0 or 1, got {numbers[name].max():g} among them.")


def _check_actions(action: np.ndarray, source: str) -> None:
    largest = np.abs(action).max()
    if largest > 1 + ACTION_TOLERANCE:
        raise UserError(
            f"{source}: actions reach {largest:g} in size and must be in [-1, 1]: give the environment's own bound as "
            "--action_bound."
        )


def _check_terminals(dataset: Dataset) -> None:
    """Where the environment's rule is known, terminals follow it: time limits are no terminals."""
    rule = termination.of(dataset.environment) if dataset.environment else None
    if rule is None:
        return
    wrong = np.asarray(rule(jnp.asarray(dataset.next_obs))) != dataset.terminated
    if wrong.sum() > TERMINAL_TOLERANCE * len(dataset):
        raise UserError(
            f"{dataset.source}: terminals differ from what {dataset.environment} says of next_observations in "
            f"{wrong.sum()} of {len(dataset)} rows, first in row {wrong.argmax()}; time limits belong in timeouts, and "
            "the next observation is the one before a reset."
        )


def check_environment(
    dataset: Dataset, env_name: str, obs_dim: int, action_dim: int, max_steps: int | None = None
) -> None:
    """Refuses a dataset of another environment, and warns of one that only has the same family's name.

    Args:
        dataset: checked.
        env_name: where policies are evaluated.
        obs_dim: of that environment.
        action_dim: of that environment.
        max_steps: its time limit; None: not checked.

    Raises:
        UserError: names or sizes differ, or an episode is longer than the time limit.
    """
    own, source = dataset.environment, dataset.source
    family = lambda name: name.lower().partition(":")[0].partition("-")[0]  # noqa: E731
    if own and family(own) != family(env_name):
        raise UserError(f"{source} is a dataset of {own}, not of --env_name {env_name}.")
    for what, found, needed in (
        ("observations", dataset.obs_dim, obs_dim),
        ("actions", dataset.action_dim, action_dim),
    ):
        if found != needed:
            raise UserError(f"{source}: {what} have {found} numbers, those of --env_name {env_name} have {needed}.")
    if own and own != env_name:
        warn(f"{source} is from {own}, not from {env_name}: the physics may be another.")
    longest = int(dataset.lengths().max())
    if max_steps is not None and longest > max_steps:
        raise UserError(
            f"{source}: an episode has {longest} rows, and the time limit of {env_name} is {max_steps} steps: mark "
            "where it was cut in timeouts."
        )
