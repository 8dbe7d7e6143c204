"""Sweep files with any one node replaced are read, or refused in one sentence: never a traceback."""

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from purejax_bilevel.errors import UserError
from purejax_bilevel.studies import overrides, plan, presets, study, sweep, sweep_command
from tests.programs.programs import mostly

REPLACEMENTS: tuple[Any, ...] = (
    None, "text", True, -1, 0.5, 10**30, 10**400, float("inf"), [], [[1, 2], [3]], [None], {}, {"omd": 1}, [{"a": 1}],
    {1: 2}, datetime.date(2020, 1, 1),
)  # fmt: skip
OVERRIDES: tuple[dict[str, Any], ...] = (
    {"agent_type": ["omd", None]},
    {"agents": [["omd"]]},
    {"agents": {}, "seeds.count": None},
    {"search.method": "es", "seeds.count": 3},
    {"search.space": [1], "report.figures": "all"},
    {"discount": [[0.1], 2]},
    {"discount": {"low": 1}},
    {"batch_size": "many"},
)


def schema() -> dict[str, Any]:
    """The example that explains sweep files."""
    indented = [line[4:] for line in str(study.__doc__).splitlines() if line.startswith("    ")]
    return yaml.safe_load("\n".join(indented))


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from nodes(entry, (*path, key))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def outcome(description: Any, changes: dict[str, Any]) -> str:
    """`read`, or the sentence that refuses the file; anything else raises."""
    try:
        checked = study.parse(overrides.override(description, changes) if changes else description)
        sweep.check_report(checked, plan.make_agents(checked))
    except UserError as error:
        return str(error)
    return "read"


FUZZED = (  # one of each program; test_sweep.py reads all
    "omd_narrow_model", "omd_continuous", "regression_agents", "tabular_ift_noise", "pessimism_sweep", "ensemble_toy",
    "groove_regret", "lpg_meta_test", "open_ablation", "open_meta_training", "observatory",
)  # fmt: skip


@pytest.mark.parametrize("name", ["schema", *mostly(presets.PRESETS, {*presets.PRESETS} - {*FUZZED})])
def test_a_file_with_one_node_replaced_is_read_or_refused_in_a_sentence(name, files_of_presets):
    content = schema() if name == "schema" else presets.preset(name, "smoke")
    # A node meets half or a quarter of them, its neighbours the others: presets have many nodes of each kind.
    share = 2 if name == "schema" else 8
    found = [
        outcome(replaced(content, path, new), {})
        for number, path in enumerate(nodes(content))
        for new in REPLACEMENTS[number % share :: share]
    ]
    assert "read" in found
    assert len(set(found)) > 40 // share
    assert not any("\n" in sentence for sentence in found)


@pytest.mark.parametrize("changes", OVERRIDES, ids=str)
def test_an_override_is_read_or_refused_in_a_sentence(changes):
    assert outcome(schema(), changes) != "read" or changes == {"search.method": "es", "seeds.count": 3}
    for path in nodes(schema()):
        for new in (None, "text", [[1]], {"omd": 1}):
            outcome(replaced(schema(), path, new), changes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("program: rl\nprogram: tabular\n", "the key 'program' is stated twice .* line 2"),
        ("settings: {lr: 0.1, lr: 0.2}", "the key 'lr' is stated twice"),
        ("axes: &all [*all]", "contains itself"),
        ("name: 2020-99-99", "is not YAML"),
        ("[1, 2]", "must be a mapping from names to values"),
        ("a: *nowhere", "undefined alias"),
        ("{[1]: 2}", "is not YAML"),
    ],
)
def test_what_yaml_would_let_pass_is_refused(tmp_path, text, sentence):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        study.read(path)
    assert "\n" not in str(caught.value)


def test_merged_mappings_are_no_duplicates(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("settings: &all {lr: 0.1, tau: 0.2}\nagents: {omd: {<<: *all, lr: 0.3}}\n")
    assert study.read(path)["agents"] == {"omd": {"lr": 0.3, "tau": 0.2}}


@pytest.mark.parametrize("word", ["lr=*x", "lr=1,*x", "lr={a: 1, a: 2}", "lr=[", "lr=2020-99-99"])
def test_overrides_that_are_no_yaml_are_refused(word):
    with pytest.raises(UserError, match="is not YAML"):
        sweep_command.split_overrides([word])
