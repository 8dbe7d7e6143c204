"""What configurations refuse, before anything is compiled."""

import math
from typing import ClassVar, Literal

import numpy as np
import pytest

from purejax_bilevel import RLConfig, configuration
from purejax_bilevel.configuration import POSITIVE, at_least, fields, static, traced, validate
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs import REGISTRY
from purejax_bilevel.studies.study import config_class as config_class_of


@configuration.configuration
class Single:
    steps: int = static(1, "steps", at_least(1))
    width: int = traced(1, "width", at_least(1))
    lr: float | None = traced(1e-3, "rate", POSITIVE)
    bound: float = traced(math.inf, "bound", configuration.Check("a number above 0", lambda x: x > 0))
    level: str = static("plain", "what is solved", task=True)
    kind: Literal["a", "b"] = static("a", "kind")
    words: str = static("one", "words", configuration.Check("one word", lambda text: len(text.split()) == 1))


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
        ({"bound": 10**400}, "--bound must be a number above 0, got 1000"),
        ({"steps": 10**400}, "--steps must be a whole number of at least 1, got 1000"),
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
        ({"words": 3}, "--words must be one word, got 3"),
        (
            {"lr": np.zeros((2, 2))},
            r"--lr must be .* above 0, got array\(\[\[0\., 0\.\], +\[0\., 0\.\]\]\)\.$",
        ),
        ({"kind": ["a"]}, r"--kind must be one of a, b, got \['a'\]\.$"),
        ({"kind": np.array(["a", "b"])}, "--kind must be one of a, b, got array"),
    ],
)
def test_what_is_no_value_is_refused(changes: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        validate(Single(**changes))


ODD = (None, True, [], ((1, 2),), {}, "", "a\nb", -1, 0.5, math.nan, 10**400, 2**31, b"x", np.zeros((2, 2)), range(3))


@pytest.mark.parametrize("program", REGISTRY)
def test_odd_values_of_any_field_are_accepted_or_refused_in_a_sentence(program: str):
    """Types are checked before anything is made of them, such as tuned values, datasets and levels."""
    config_class, refusals = config_class_of(program), []
    for number, field in enumerate(fields(config_class)):
        for value in ODD[number % 3 :: 3]:  # every field meets a third of them, its neighbours the others
            try:
                config_class(**{field.name: value}).resolved()
            except UserError as error:
                refusals.append(str(error))
    assert len(set(refusals)) > len(list(fields(config_class)))
    assert not any("\n" in sentence for sentence in refusals)


@pytest.mark.parametrize(
    ("program", "field"),
    [
        ("ppo", "num_layers"),
        ("open_training", "num_layers"),
        ("offline", "num_layers"),
        ("offline", "num_critics"),
        ("ensemble", "model_layers"),
        ("rl", "num_ensemble_vep"),
    ],
)
def test_networks_and_layers_that_would_take_forever_to_list_are_refused(program: str, field: str):
    with pytest.raises(UserError, match=f"--{field} must be a whole number from 1 to 1000, got 1000000000"):
        config_class_of(program)(**{field: 10**9}).resolved()


def test_environments_are_tasks():
    assert [field.name for field in fields(Single) if field.metadata.get("task")] == ["level"]
    assert [field.name for field in fields(RLConfig) if field.metadata.get("task")] == [
        "env_name",
        "transition_steps",
        "plateau_steps",
    ]


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
