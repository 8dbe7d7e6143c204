"""Datasets of users' own: objects that got a name, and functions that are named.

    own_datasets.register("mine", dataset)                      # a Dataset, or arrays by their names in `COLUMNS`
    run(Config(agent_type="mopo", dataset="mine"))              # from Python
    python train_rl.py --dataset mymodule:make_dataset          # what a function returns

They are checked as files are, and a run that goes on with another dataset of the same name is refused.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purejax_bilevel.configuration import named_object
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import dataset_files, toy
from purejax_bilevel.programs.offline.datasets import ARRAYS, COLUMNS, Dataset, checked

_REGISTERED: dict[str, Any] = {}


def register(name: str, dataset: Dataset | Mapping[str, Any]) -> None:
    """Gives a dataset of your own a name, by which configurations then know it.

    Args:
        name: for `dataset`, letters, digits, - and _; a name registered before is replaced.
        dataset: transitions, or arrays by the names in `datasets.COLUMNS`.

    Raises:
        UserError: the name is taken or could be a file's, or what is in the dataset cannot be.
    """
    if name in (toy.NAME, toy.GRID):
        raise UserError(f"own_datasets.register: {name} is a dataset already; choose another name.")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"own_datasets.register: a name must have letters, digits, - and _ alone, got {name!r}.")
    _dataset(dataset, name, 1.0)
    _REGISTERED[name] = dataset
    _own.cache_clear()


def load(place: str, action_bound: float = 1.0) -> Dataset:
    """A dataset by its name, from the function that returns it, or from a file.

    Args:
        place: a name of `register`, `sine`, `sine-grid`, `module:function`, a file or a folder of Minari.
        action_bound: what actions are divided by to be in [-1, 1].

    Raises:
        UserError: there is none, or what is in it cannot be.
    """
    if place in (toy.NAME, toy.GRID):
        return toy.make(place)
    is_function = ":" in place and "/" not in place and not Path(place).exists()
    return _own(place, action_bound) if is_function or place in _REGISTERED else dataset_files.load(place, action_bound)


@functools.cache  # programs that share a dataset must return the same object
def _own(place: str, action_bound: float) -> Dataset:
    return _dataset(_REGISTERED[place] if place in _REGISTERED else _made(place), place, action_bound)


def _made(place: str) -> Any:
    function = named_object("dataset", place, "function")
    if not callable(function):
        raise UserError(f"--dataset {place} must name a function that returns a dataset, got {function!r}.")
    try:
        return function()
    except Exception as error:  # whatever a stranger's code may raise
        raise UserError(f"--dataset {place}: the function fails ({type(error).__name__}: {error}).") from error


def _dataset(given: Any, place: str, action_bound: float) -> Dataset:
    if isinstance(given, Dataset):
        arrays = {column: getattr(given, name) for column, name in zip(COLUMNS, ARRAYS, strict=True)}
        about = {"environment": given.environment, "scores": given.scores, "about": given.about}
        return checked(arrays, place, action_bound, **about)
    if not isinstance(given, Mapping) or not set(COLUMNS) <= set(given):
        raise UserError(f"--dataset {place} must be a Dataset or have the arrays {', '.join(COLUMNS)}.")
    return checked(given, place, action_bound, environment=str(given.get("environment", "")))
