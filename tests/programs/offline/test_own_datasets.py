"""Datasets of users' own: registered objects, and functions named on the command line."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import own_datasets
from purejax_bilevel.programs.offline.datasets import checked
from purejax_bilevel.programs.offline.ensemble_program import Config
from purejax_bilevel.studies import command_line
from tests.programs.offline.test_datasets import arrays

HERE = __name__


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(own_datasets, "_REGISTERED", {})
    yield
    own_datasets._own.cache_clear()


def named_arrays() -> dict:
    return {**arrays(400), "environment": "somewhere"}


def whole():
    return checked(arrays(400), "mine")


def wild():
    return arrays(actions=np.full((12, 2), 7.0))


def fails():
    raise RuntimeError("no licence")


def test_a_registered_dataset_goes_by_its_name():
    own_datasets.register("mine", whole())
    config = Config(dataset="mine", dataset_rows=350).resolved()
    assert len(config.program().data) == 350
    assert own_datasets.load("mine") is own_datasets.load("mine")  # shared by all programs
    np.testing.assert_array_equal(own_datasets.load("mine").rows, whole().rows)
    own_datasets.register("mine", dataclasses.replace(whole(), reward=whole().reward + 1))
    assert own_datasets.load("mine").reward[0] == whole().reward[0] + 1


@pytest.mark.parametrize("name", ["whole", "named_arrays"])
def test_the_command_line_names_a_function(name: str):
    words = ["--dataset", f"{HERE}:{name}", "--action_bound", "2"]
    _, config = command_line.parse(Config, "", words)
    found = config.resolved().program().data
    np.testing.assert_array_equal(found.action, whole().action / 2)
    assert found.environment == ("somewhere" if name == "named_arrays" else "")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("no_such_module:make", "the module no_such_module cannot be imported"),
        (f"{HERE}:nothing", "has no function 'nothing'"),
        (f"{HERE}:HERE", "must name a function that returns a dataset"),
        (f"{HERE}:fails", "the function fails .RuntimeError: no licence"),
        (f"{HERE}:test_the_command_line_names_a_function", "the function fails .TypeError"),
        (f"{HERE}:dict", "has no function 'dict'"),
        (f"{HERE}:wild", "actions"),
        ("unknown", "there is no such file"),
    ],
)
def test_what_is_no_dataset_is_refused(place: str, sentence: str):
    with pytest.raises(UserError, match=sentence):
        Config(dataset=place).resolved()


@pytest.mark.parametrize("name", ["sine", "runs/x.npz", "a:b", ""])
def test_a_name_that_cannot_be_is_refused(name: str):
    with pytest.raises(UserError, match=r"own_datasets\.register"):
        own_datasets.register(name, whole())


def test_what_is_no_dataset_cannot_be_registered():
    with pytest.raises(UserError, match="mine must be a Dataset or have the arrays observations"):
        own_datasets.register("mine", {"rewards": np.zeros(3)})
