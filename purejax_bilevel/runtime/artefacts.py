"""Artefacts: what a run leaves for others to start from, such as a model, a policy or the weights of an optimiser.

`artefact.safetensors` holds the arrays of all members, `[members, ...]`, named by their place in the tree, and
`artefact.json` what they are: kind, shapes, members, configuration. Both formats are read anywhere, and loading runs no
code of the file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from purejax_bilevel.errors import UserError
from purejax_bilevel.results.dataset import as_plain, write_bytes, write_text

FORMAT = "purejax_bilevel artefact 1"
FILE_NAME = "artefact.safetensors"
Tree = Any


class Artefact(NamedTuple):
    """Arrays `[members, ...]` by name, and what the file says of them."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]

    def member(self, number: int, like: Tree = None) -> Tree:
        """One member's arrays.

        Args:
            number: of the member.
            like: the structure to return, leaves with `shape` and `dtype`; None: a dictionary by name.

        Raises:
            UserError: there is no such member, or its arrays are others.
        """
        count = len(self.about["members"])
        if not 0 <= number < count:
            raise UserError(f"the artefact has members 0 to {count - 1}, got {number}.")
        own = {name: array[number] for name, array in self.arrays.items()}
        if like is None:
            return own
        expected = _named(like)
        for name in sorted(expected.keys() | own.keys()):
            found, needed = (_described(arrays.get(name)) for arrays in (own, expected))
            if found != needed:
                raise UserError(
                    f"the {self.about['kind']} does not fit: {name} is {found}, this program needs {needed}."
                )
        return jax.tree.unflatten(jax.tree.structure(like), [own[name] for name in expected])


def save(folder: Path, kind: str, tree: Tree, members: list[dict[str, Any]], config: Mapping[str, Any]) -> Path:
    """Writes an artefact, each file whole or not at all.

    Args:
        folder: where to.
        kind: what it is, in words; `load` asks for the same.
        tree: leaves `[members, ...]`.
        members: settings and seed of each.
        config: of the run.

    Returns:
        The file with the arrays.

    Raises:
        UserError: the place is not writable.
    """
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in _named(tree).items()}
    content = safetensors.numpy.save(arrays)
    settings = json.dumps(as_plain(config), sort_keys=True)
    about = {
        "format": FORMAT,
        "kind": kind,
        "members": as_plain(members),
        "shapes": {name: list(array.shape[1:]) for name, array in arrays.items()},
        "config": as_plain(config),
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_bytes(folder / FILE_NAME, content)
    write_text((folder / FILE_NAME).with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    return folder / FILE_NAME


def load(place: str | Path, kind: str, *others: str) -> Artefact:
    """Reads an artefact.

    Args:
        place: folder of a run, or the file with the arrays.
        kind: what it must be.
        others: what it may be instead.

    Raises:
        UserError: it is not there, not whole, or of another kind.
    """
    path = Path(place)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no {kind} at {place}: give the folder of a run that leaves one, or its {FILE_NAME}.")
    try:
        content = path.read_bytes()
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}")
        if hashlib.sha256(content).hexdigest() != about["sha256"]:
            raise ValueError("its checksum is another")
        arrays = safetensors.numpy.load(content)
        if any(len(array) != len(about["members"]) for array in arrays.values()):
            raise ValueError("it does not have all members")
        if not isinstance(about["config"], dict) or not isinstance(about["members"], list):
            raise ValueError("its settings or members are none")
        found = about["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a whole artefact ({reason}): make it again.") from error
    if found not in (kind, *others):
        raise UserError(f"{path} is a {found}, not a {kind}.")
    return Artefact(arrays, about)


def place_and_member(text: str) -> tuple[str, int]:
    """Reads `runs/x` (its first member) or `runs/x#3`.

    Raises:
        UserError: what follows the # is no number.
    """
    place, _, number = text.partition("#")
    if number and not number.isdecimal():
        raise UserError(f"after # comes the number of a member, got {text!r}.")
    return place, int(number or 0)


def _named(tree: Tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(array: Any) -> str:
    return "missing" if array is None else f"{np.dtype(array.dtype).name}{list(array.shape)}"
