"""Which network and which layer each array of an agent belongs to, read off the paths of its tree or given.

Everything here is known when a program is traced.
"""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.errors import UserError

Tree = Any
Path = tuple[Any, ...]
ROLES = {"actor": ("actor", "policy"), "critic": ("critic", "value")}
ONLY = "network"  # the name of a network whose paths name no role


class Place(NamedTuple):
    """What the optimiser knows of one array of the agent."""

    name: str
    shape: tuple[int, ...]
    network: str
    proportion: float  # of the layer in its network: first 0, last 1
    noisy: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Layout(NamedTuple):
    """The arrays of an agent, in the order in which their entries are joined: network after network."""

    places: tuple[Place, ...]
    order: tuple[int, ...]  # index of each among the leaves of the tree

    @property
    def size(self) -> int:
        """N, the number of parameters."""
        return sum(place.size for place in self.places)

    @property
    def networks(self) -> dict[str, int]:
        """Number of parameters of each network, in order."""
        sizes: dict[str, int] = {}
        for place in self.places:
            sizes[place.network] = sizes.get(place.network, 0) + place.size
        return sizes

    def join(self, leaves: list[jax.Array], dtype: Any) -> jax.Array:
        """One vector `[N]` of the leaves of a tree like the agent's."""
        return jnp.concatenate([leaves[index].astype(dtype).ravel() for index in self.order])

    def row(self, numbers: list[float], dtype: Any) -> jax.Array:
        """A vector `[N]` of one number for each array."""
        return jnp.concatenate(
            [jnp.full(place.size, number, dtype) for place, number in zip(self.places, numbers, strict=True)]
        )

    def pieces(self, joined: jax.Array) -> list[jax.Array]:
        """The columns of each array, of something `[..., N]`."""
        return jnp.split(joined, np.cumsum([place.size for place in self.places])[:-1].tolist(), axis=-1)

    def leaves(self, joined: jax.Array) -> list[jax.Array]:
        """The leaves of a tree like the agent's, from a vector `[N]`."""
        shaped = [piece.reshape(place.shape) for piece, place in zip(self.pieces(joined), self.places, strict=True)]
        return [shaped[self.order.index(index)] for index in range(len(shaped))]


def layout_of(params: Tree, networks: Tree = None, layers: Tree = None, noisy: Tree = None) -> Layout:
    """Reads the layout of an agent.

    By default an array belongs to the network that its path names first (`actor` or `policy`, `critic` or `value`, as
    part of a name), else to the only one; what lies in one innermost container is a layer; layers follow each other by
    name, numbers in names by value, what lies beside layers (a `log_std`) last; the actor alone is noisy.

    Args:
        params: the agent.
        networks: names, a prefix of the agent's tree.
        layers: whole numbers in the order of the layers, a prefix of the agent's tree.
        noisy: booleans, a prefix of the agent's tree.

    Raises:
        UserError: what is given does not fit the tree, or an array does not hold real numbers.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    paths = [path for path, _ in flat]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    if not flat:
        raise UserError("the agent has no parameters.")
    for name, (_, leaf) in zip(names, flat, strict=True):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise UserError(f"parameter {name} is {jnp.result_type(leaf)}, only real numbers can be optimised.")
    owners = [_role(path) for path in paths] if networks is None else spread("networks", networks, params)
    depths = _depths(paths) if layers is None else spread("layers", layers, params)
    loud = [owner == "actor" for owner in owners] if noisy is None else spread("noisy", noisy, params)
    proportions = _proportions(owners, depths)
    order = sorted(range(len(flat)), key=lambda index: owners.index(owners[index]))
    shapes = [tuple(np.shape(leaf)) for _, leaf in flat]
    places = (Place(names[i], shapes[i], owners[i], proportions[i], bool(loud[i])) for i in order)
    return Layout(tuple(places), tuple(order))


def spread(what: str, prefix: Tree, params: Tree) -> list[Any]:
    """One entry of a prefix tree for each leaf of the agent; None counts as an entry.

    Raises:
        UserError: it is not a prefix of the agent's tree.
    """
    try:
        full = jax.tree.broadcast(prefix, params, is_leaf=lambda entry: entry is None)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{what} must have the tree of the parameters, or the upper part of it: {reason}") from error
    return jax.tree.leaves(full, is_leaf=lambda entry: entry is None)


def _role(path: Path) -> str:
    for entry in path:
        name = _text(entry).lower()
        roles = [role for role, words in ROLES.items() if any(word in name for word in words)]
        if len(roles) == 1:
            return roles[0]
    return ONLY


def _depths(paths: list[Path]) -> list[Any]:
    """Something to sort layers by, for each leaf; equal within a layer."""
    branching = {path[:end] for path in paths for end in range(len(path) - 1)}
    seen: dict[Path, int] = {}
    for path in paths:
        for end in range(1, len(path) + 1):
            seen.setdefault(path[:end], len(seen))

    def key(path: Path) -> list[Any]:
        # Names in their natural order; fields and items in the order of their container.
        dictionaries = jax.tree_util.DictKey
        return [
            _natural(_text(entry)) if isinstance(entry, dictionaries) else seen[path[: end + 1]]
            for end, entry in enumerate(path)
        ]

    loose = [path[:-1] in branching for path in paths]
    return [(beside, key(path if beside else path[:-1])) for path, beside in zip(paths, loose, strict=True)]


def _proportions(owners: list[str], depths: list[Any]) -> list[float]:
    layers: dict[str, list[Any]] = {}
    for owner in owners:
        if owner not in layers:
            own = [depth for depth, other in zip(depths, owners, strict=True) if other == owner]
            layers[owner] = sorted([depth for index, depth in enumerate(own) if depth not in own[:index]])
    places = [(layers[owner].index(depth), len(layers[owner])) for owner, depth in zip(owners, depths, strict=True)]
    return [index / (count - 1) if count > 1 else 0.0 for index, count in places]


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _text(entry: Any) -> str:
    return jax.tree_util.keystr((entry,), simple=True)
