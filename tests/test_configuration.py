"""What configurations refuse, before anything is compiled."""

import math
from typing import ClassVar, Literal

import numpy as np
import pytest

from purejax_bilevel import RLConfig, configuration
from purejax_bilevel.configuration import POSITIVE, at_least, fields, static, traced, validate
from purejax_bilevel.errors import UserError


@configuration.configuration
class Single:
    steps: int = static(1, "steps", at_least(1))
    width: int = traced(1, "width", at_least(1))
    lr: float | None = traced(1e-3, "rate", POSITIVE)
    bound: float = traced(math.inf, "bound", configuration.Check("a number above 0", lambda x: x > 0))
    level: str = static("plain", "what is solved", task=True)
    kind: Literal["a", "b"] = static("a", "kind")


@configuration.configuration
class Double:
    float64: ClassVar = True
    lr: float = traced(1e-3, "rate", POSITIVE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": 1e39}, r"--lr must be a number that 32 bits can hold, of a size from .* got 1e\+39\.$"),
        ({"lr": (0.1, 1e-50)}, "--lr must be a number that 32 bits can hold.* got 1e-50"),
        (
            {"lr": (0.1, 0.100000000001)},
            r"--lr was given 0\.1 and 0\.100000000001, which are the same number in 32 bits",
        ),
        ({"lr": 10**400}, "--lr must be a finite number above 0, got 1000"),
        ({"steps": 2**31}, "--steps must be a whole number of at least 1 and at most 2147483647 .*, got 2147483648"),
        ({"width": (1, 2**40)}, "--width must be .* at most 2147483647"),
    ],
)
def test_numbers_that_32_bits_cannot_hold_are_refused(changes: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        validate(Single(**changes))


def test_what_32_bits_hold_is_accepted():
    validate(Single(steps=2**31 - 1, lr=(1e-30, 1e30), bound=math.inf))


def test_64_bits_hold_more():
    assert validate(Double(lr=(0.1, 0.1 + 1e-12, 1e39, 1e-50)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": [[0.1, 0.2], [0.3]]}, r"--lr must be a finite number above 0, got \[\[0\.1, 0\.2\], \[0\.3\]\]\.$"),
        ({"lr": (0.1, [0.2])}, r"--lr must be .*, got \(0\.1, \[0\.2\]\)\.$"),
        ({"lr": {"a": 1}}, "--lr must be .*, got {'a': 1}"),
        ({"level": 10**30}, r"--level must be text, got 1000"),
        ({"level": ["plain"]}, r"--level must be text, got \['plain'\]\.$"),
        ({"kind": ["a"]}, r"--kind must be one of a, b, got \['a'\]\.$"),
        ({"kind": np.array(["a", "b"])}, "--kind must be one of a, b, got array"),
    ],
)
def test_what_is_no_value_is_refused(changes: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        validate(Single(**changes))


def test_environments_are_tasks():
    assert [field.name for field in fields(Single) if field.metadata.get("task")] == ["level"]
    assert [field.name for field in fields(RLConfig) if field.metadata.get("task")] == ["env_name"]


def test_one_of_several_processes_prints_the_warnings(capsys, monkeypatch):
    monkeypatch.setattr(configuration, "is_quiet", True)
    configuration.warn("of a process that is not the first")
    assert capsys.readouterr().err == ""


def test_a_run_of_random_steps_alone_is_told_once(capsys):
    configuration.warn.cache_clear()
    for _ in range(2):
        RLConfig(num_train_steps=1000).resolved()
    RLConfig(num_train_steps=1001).resolved()
    told = capsys.readouterr().err
    assert told == (
        "warning: --num_train_steps 1000 is not above --init_steps 1000, the random start: nothing will be learned.\n"
    )
