"""What members carry, before anything is compiled: shapes, types and places of their arrays."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purejax_bilevel.program import POPULATION, Configuration, Part, Program, Tree, called_outside
from purejax_bilevel.runtime.devices import AXIS
from purejax_bilevel.runtime.steps import Functions, Stored, fresh_member, fresh_state, typed_keys


def member_arrays(mesh: Mesh, functions: Functions, config: Configuration, seeds: Any, shared: Tree) -> Stored:
    """Shapes and types of what the members of a part carry, with their whole population.

    The functions are traced as the compiled program will call them, on the mesh: it need not trace them again.
    """

    def traced_shapes(function: Callable, *arguments: Any) -> Tree:
        function = functools.partial(function, functions)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        found = jax.eval_shape(mapped, *arguments)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found)  # without weak types

    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (config, seeds))
    state = traced_shapes(fresh_state, *one, shared)
    here = traced_shapes(fresh_member, state, *one, shared, jax.ShapeDtypeStruct((), jnp.int32))
    split, factor = _split(functions.program, here), mesh.shape[POPULATION]

    def of_all(leaf: Any, own: bool) -> jax.ShapeDtypeStruct:
        first, rest = leaf.shape[:own], leaf.shape[own:]
        return jax.ShapeDtypeStruct((seeds.shape[0], *(size * factor for size in first), *rest), leaf.dtype)

    return jax.tree.map(of_all, here, split)


def _split(program: Program, shapes: Stored) -> Stored:
    """Which of a member's arrays have the individuals of its population as first dimension."""
    no = jax.tree.map(lambda _: False, shapes)
    return no._replace(state=program.individuals(shapes.state)) if program.population else no


def specs_of(program: Program, shapes: Stored) -> Stored:
    """Along which axes of the mesh the members' arrays lie."""
    return jax.tree.map(lambda own: P(AXIS, POPULATION) if own else P(AXIS), _split(program, shapes))


def shapes_of(tree: Tree) -> Any:
    """What two trees have in common that one compiled program takes."""
    return jax.tree.structure(tree), [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in jax.tree.leaves(tree)]


def with_length(length: int, leaf: Any) -> jax.ShapeDtypeStruct:
    """The same for another number of members."""
    return jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype)


def typed_state(part: Part, plain: Tree) -> Tree:
    """A member's state as the algorithm's functions take it, from the plain numbers that the host keeps."""
    own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], part.config)
    return typed_keys(plain, state_shapes(part.program, own))


def state_shapes(program: Program, config: Configuration) -> Tree:
    """Shapes and types of one member's state, with its whole population.

    Args:
        program: of the member.
        config: of the member; shapes and types are enough.
    """
    shared = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, _default_type(leaf.dtype)), program.shared())
    init = called_outside(program, program.init)
    return jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)), config, shared)


def zeros(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
    """An array of zeros on its devices."""
    return jax.make_array_from_callback(shape.shape, sharding, np.zeros(shape.shape, shape.dtype).__getitem__)


def padded_indices(num_members: int, num_devices: int, each: int, room: int) -> np.ndarray:
    """Which member lies where: on each device `each` that are computed (the first ones again where there are no more)
    in arrays with room for `room`."""
    own = np.arange(num_devices)[:, None] * each + np.minimum(np.arange(room), each - 1)
    return own.ravel() % num_members


def as_default_type(array: np.ndarray) -> np.ndarray:
    """Floats in the precision that jax is set to."""
    return array.astype(_default_type(array.dtype))


def _default_type(dtype: Any) -> Any:
    return jnp.result_type(float) if dtype.kind == "f" and dtype != np.float16 else dtype


FREE = ("broadcast_in_dim", "iota")  # primitives whose results the compiler need not store


def largest_array(program: jax.extend.core.ClosedJaxpr) -> int:
    """Bytes of the largest array that is made inside a traced program, on one device.

    Arguments and results of the program itself, which devices share, do not count.
    """
    return max(map(_largest_inside, program.jaxpr.eqns), default=0)


def _largest(jaxpr: jax.extend.core.Jaxpr) -> int:
    largest = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name not in FREE:
            made: list[Any] = [variable.aval for variable in equation.outvars if hasattr(variable.aval, "shape")]
            sizes = [math.prod(array.shape) * getattr(array.dtype, "itemsize", 0) for array in made]
            largest = max(largest, *sizes, 0)
        largest = max(largest, _largest_inside(equation))
    return largest


def _largest_inside(equation: jax.extend.core.JaxprEqn) -> int:
    return max(map(_largest, jax.extend.core.jaxprs_in_params(equation.params)), default=0)
