"""The network of OPEN on the features of all parameters: all at once, or in blocks that stay in a CPU's cache."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import networks
from purejax_bilevel.programs.learned_optimizers.weights import NUM_OUTPUTS, Weights, apply_network

BLOCK = 1024  # columns; 512 to 4096 take about the same time, larger networks prefer fewer
MOST_IN_BLOCKS = 10_000_000  # parameters: the blocks are listed while a program is traced
Results = tuple[jax.Array, jax.Array]  # outputs [3, n], new carry [carry, n]


class Piece(NamedTuple):
    """Neighbouring columns of one array."""

    array: int
    begin: int
    end: int


class Features(NamedTuple):
    """What the network sees of n parameters, array after array."""

    sizes: tuple[int, ...]  # of the arrays
    own: jax.Array  # [15, n], to be multiplied by
    scales: jax.Array  # [15, arrays]
    context: jax.Array  # [4, n]

    def pieces(self) -> list[Piece]:
        """Each array."""
        ends = np.cumsum(self.sizes).tolist()
        return [Piece(i, end - self.sizes[i], end) for i, end in enumerate(ends)]

    def rows(self) -> jax.Array:
        """All features, `[19, n]`."""
        scaled = [self.own[:, begin:end] * self.scales[:, i : i + 1] for i, begin, end in self.pieces()]
        return jnp.concatenate([jnp.concatenate(scaled, 1), self.context])

    def only(self, pieces: Sequence[Piece]) -> "Features":
        """Those of some pieces, which are its arrays then."""
        arrays = [piece.array for piece in pieces]
        sizes = tuple(piece.end - piece.begin for piece in pieces)
        return Features(sizes, cut(self.own, pieces), self.scales[:, np.array(arrays)], cut(self.context, pieces))


def cut(rows: jax.Array, pieces: Sequence[Piece]) -> jax.Array:
    """The columns of some pieces."""
    return jnp.concatenate([rows[:, piece.begin : piece.end] for piece in pieces], 1)


def run(weights: Weights, features: Features, carry: jax.Array) -> Results:
    """The network's outputs and the new state of its recurrent cell.

    Args:
        weights: of the network.
        features: of n parameters.
        carry: state of the recurrent cell `[carry, n]`.

    Returns:
        `[3, n]` and `[carry, n]`.
    """
    if networks.together() or carry.shape[1] > MOST_IN_BLOCKS:
        return apply_network(weights, features.rows(), carry)
    parts = [
        Piece(i, start, min(start + BLOCK, end))
        for i, begin, end in features.pieces()
        for start in range(begin, end, BLOCK)
    ]
    blocks = [piece for piece in parts if piece.end - piece.begin == BLOCK]
    if not blocks:
        return apply_network(weights, features.rows(), carry)
    found = _blocks(weights, features, blocks, (jnp.zeros((NUM_OUTPUTS, carry.shape[1]), carry.dtype), carry))
    rest = [piece for piece in parts if piece.end - piece.begin < BLOCK]
    return _others(weights, features, rest, found) if rest else found


def _blocks(weights: Weights, features: Features, blocks: Sequence[Piece], found: Results) -> Results:
    """With the results for whole blocks, one after the other."""
    arrays, begins, _ = jnp.array(blocks).T

    def block(number: jax.Array, found: Results) -> Results:
        begin = begins[number]
        own, context, carry = (
            jax.lax.dynamic_slice_in_dim(rows, begin, BLOCK, 1) for rows in (features.own, features.context, found[1])
        )
        scales = jax.lax.dynamic_slice_in_dim(features.scales, arrays[number], 1, 1)
        seen = Features((BLOCK,), own, scales, context)
        return _placed(found, apply_network(weights, seen.rows(), carry), begin)

    return jax.lax.fori_loop(0, len(blocks), block, found)


def _others(weights: Weights, features: Features, pieces: Sequence[Piece], found: Results) -> Results:
    """With the results for small pieces, all at once."""
    seen = features.only(pieces)
    outputs, carry = apply_network(weights, seen.rows(), cut(found[1], pieces))
    for piece, (_, begin, end) in zip(pieces, seen.pieces(), strict=True):
        found = _placed(found, (outputs[:, begin:end], carry[:, begin:end]), piece.begin)
    return found


def _placed(found: Results, own: Results, begin: jax.Array | int) -> Results:
    outputs, carry = (jax.lax.dynamic_update_slice_in_dim(*pair, begin, 1) for pair in zip(found, own, strict=True))
    return outputs, carry
