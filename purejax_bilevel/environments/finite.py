"""Finite Markov decision processes: where they come from, and exact dynamic programming in them.

The maximum over actions is smoothed by a temperature T: V(s) = T logsumexp(Q(s, .) / T), attained by the policy
softmax(Q / T). Its optimality equation has one solution, which Newton's method finds in a few steps.

Everything is written as sums of products rather than matrix calls: with a handful of states, a batched matrix call
costs far more than its arithmetic, and LAPACK under vmap may deadlock on a CPU with two threads.
"""

from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purejax_bilevel.errors import UserError

UNROLLED = 6  # most states for which the elimination is written out
SUM_TOLERANCE = 1e-6  # of probabilities in a file
NEWTON_TOLERANCE = 1e-9  # the next step would be about its square over the temperature: rounding level
NEWTON_STEPS = 100
ARRAYS = ("P", "R", "gamma", "start")  # of a file


class MDP(flax.struct.PyTreeNode):
    """A finite Markov decision process."""

    transition: jax.Array  # [actions, states, next states]
    reward: jax.Array  # [states, actions]
    discount: jax.Array  # []
    start: jax.Array  # [states], distribution of the first state


# --- sources ----------------------------------------------------------------------------------------------------------


def two_state() -> MDP:
    """Two states, two actions, discount 0.9: Dadashi et al. 2019, "The value function polytope", appendix A (d)."""
    transition = np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.99, 0.01], [0.99, 0.01]]])
    reward = np.array([[-0.45, -0.1], [0.5, 0.5]])
    return MDP(transition, reward, np.array(0.9), np.array([0.5, 0.5]))  # type: ignore[arg-type]


def garnet(key: jax.Array, num_states: int, num_actions: int, branching: int, discount: float | jax.Array) -> MDP:
    """A random MDP (Archibald et al. 1995, "On the generation of Markov decision processes").

    Each state and action leads to `branching` different states, drawn uniformly; their probabilities are the pieces
    of a stick broken at uniform places. Rewards are standard normal, the first state is uniform.

    Args:
        key: consumed.
        num_states: number of states.
        num_actions: number of actions.
        branching: from 1 to `num_states`.
        discount: may be traced.
    """
    states_key, breaks_key, reward_key = jax.random.split(key, 3)
    pairs = (num_actions, num_states)
    order = jax.random.uniform(states_key, (*pairs, num_states)).argsort(axis=-1)
    breaks = jnp.sort(jax.random.uniform(breaks_key, (*pairs, branching - 1)), axis=-1)
    ends = jnp.concatenate([jnp.zeros((*pairs, 1)), breaks, jnp.ones((*pairs, 1))], axis=-1)
    chosen = order[..., :branching, None] == jnp.arange(num_states)
    transition = (jnp.diff(ends)[..., None] * chosen).sum(-2)
    reward = jax.random.normal(reward_key, (num_states, num_actions))
    return MDP(transition, reward, jnp.asarray(discount, float), jnp.full(num_states, 1 / num_states))


def load(path: str) -> MDP:
    """Reads a numpy archive with P `[actions, states, states]`, R `[states, actions]`, gamma and start `[states]`.

    Raises:
        UserError: naming the array, what it holds and what is allowed.
    """
    arrays = _read(path)
    transition, reward, discount, start = (arrays[name] for name in ARRAYS)
    if transition.ndim != 3 or transition.shape[1] != transition.shape[2] or 0 in transition.shape:
        raise UserError(f"--mdp_file {path}: P must have shape [actions, states, states], got {transition.shape}.")
    num_actions, num_states, _ = transition.shape
    for name, shape in (("R", (num_states, num_actions)), ("gamma", ()), ("start", (num_states,))):
        if arrays[name].shape != shape:
            raise UserError(
                f"--mdp_file {path}: {name} must have shape {shape} beside this P, got {arrays[name].shape}."
            )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"--mdp_file {path}: {name} must hold finite numbers, got {array[~np.isfinite(array)][0]}.")
    for name, array in (("P", transition), ("start", start)):
        _check_distributions(path, name, array)
    if not 0 <= discount < 1:
        raise UserError(f"--mdp_file {path}: gamma must be from 0 to below 1, got {discount}.")
    return MDP(transition, reward, discount, start)  # type: ignore[arg-type]


def _read(path: str) -> dict[str, np.ndarray]:
    if not Path(path).is_file():
        raise UserError(f"--mdp_file {path}: there is no such file.")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            arrays = {name: archive[name] for name in ARRAYS if name in names}
    except Exception as error:  # a damaged archive fails in a dozen ways, in zipfile, zlib, ast and numpy
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"--mdp_file {path}: it must be a numpy archive (.npz) of numbers ({reason}).") from error
    for name in ARRAYS:
        if name not in arrays:
            found = ", ".join(map(repr, names)) or "nothing"
            raise UserError(f"--mdp_file {path}: there is no {name} among its arrays ({found}).")
        if not isinstance(arrays[name], np.ndarray) or arrays[name].dtype.kind not in "fiub":
            kind = getattr(arrays[name], "dtype", "no array")
            raise UserError(
                f"--mdp_file {path}: it must be a numpy archive (.npz) of numbers; {name} holds real numbers, got "
                f"{kind}."
            )
    with np.errstate(all="ignore"):  # larger than 64 bits hold: not finite, which is said later
        return {name: array.astype(np.float64) for name, array in arrays.items()}


def _check_distributions(path: str, name: str, array: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        sums = array.sum(-1)
    wrong = np.argwhere((array < 0).any(-1) | (np.abs(sums - 1) > SUM_TOLERANCE))
    if len(wrong):
        index = tuple(int(i) for i in wrong[0])
        where = f"{name}[{', '.join(map(str, index))}]" if index else name
        row = array[index]
        got = f"a sum of {sums[index]:g}" if (row >= 0).all() else f"the entry {row.min():g}"
        raise UserError(f"--mdp_file {path}: {where} must hold probabilities that sum to 1, got {got}.")


# --- dynamic programming ----------------------------------------------------------------------------------------------


def state_values(q: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Smooth maximum over actions: T logsumexp(Q / T), `[states]` from `[states, actions]`."""
    return temperature * jax.nn.logsumexp(q / temperature, axis=-1)


def policy(q: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """softmax(Q / T), `[states, actions]`."""
    return jax.nn.softmax(q / temperature, axis=-1)


def action_values(mdp: MDP, values: jax.Array) -> jax.Array:
    """R + discount * P V, `[states, actions]` from `[states]`."""
    return mdp.reward + mdp.discount * (mdp.transition * values).sum(-1).T


def bellman(mdp: MDP, q: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """Smooth Bellman optimality operator on action values `[states, actions]`."""
    return action_values(mdp, state_values(q, temperature))


def dynamics(mdp: MDP, chances: jax.Array) -> jax.Array:
    """Transition matrix `[states, next states]` of the policy `[states, actions]`."""
    return (mdp.transition * chances.T[..., None]).sum(0)


def optimal_values(mdp: MDP, temperature: float | jax.Array, initial: jax.Array) -> jax.Array:
    """State values that solve the smooth Bellman equation, `[states]`, by Newton's method.

    The operator is convex and monotone with Jacobian discount * P_pi, pi being the current softmax policy: Newton's
    method is soft policy iteration and converges from everywhere. The steps are not to be differentiated: use
    `bilevel.implicit` on `bellman`.

    Args:
        mdp: the process.
        temperature: T, above 0.
        initial: any state values; near the solution, as those of the previous outer step, one or two steps do.
    """

    def far(carry: tuple) -> jax.Array:
        count, values, size = carry
        return (count < NEWTON_STEPS) & (size > NEWTON_TOLERANCE * (1 + jnp.abs(values).max()))

    def newton(carry: tuple) -> tuple:
        count, values, _ = carry
        q = action_values(mdp, values)
        residual = state_values(q, temperature) - values
        step = _eliminate(_resolvent(mdp, policy(q, temperature)), residual)
        return count + 1, values + step, jnp.abs(step).max()

    start = (jnp.int32(0), initial, jnp.full((), jnp.inf, initial.dtype))
    return lax.while_loop(far, newton, start)[1]


def expected_return(mdp: MDP, chances: jax.Array) -> jax.Array:
    """Discounted return of the policy `[states, actions]`, mean over the first state; differentiable."""
    reward = (mdp.reward * chances).sum(-1)
    return (mdp.start * solve(_resolvent(mdp, chances), reward)).sum()


def _resolvent(mdp: MDP, chances: jax.Array) -> jax.Array:
    """I - discount * P_pi."""
    matrix = mdp.discount * dynamics(mdp, chances)
    return jnp.eye(matrix.shape[0], dtype=matrix.dtype) - matrix


def adjoint_solve(mdp: MDP, chances: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Solves (I - J)^T u = cotangent for the Jacobian J of `bellman` where its policy is `chances`.

    J = discount * P Pi factors through the states, so that a system of their number is enough:
    u = v + Pi^T y with (I - discount * P_pi)^T y = discount * P^T v.

    Args:
        mdp: the process.
        chances: policy `[states, actions]`.
        cotangent: v, `[states, actions]`.
    """
    reached = mdp.discount * (mdp.transition * cotangent.T[..., None]).sum((0, 1))
    return cotangent + chances * solve(_resolvent(mdp, chances).T, reached)[:, None]


def solve(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """Solves matrix `[n, n]` x = b `[n]` for a matrix with a dominant diagonal; a derivative costs one more solve."""

    def product(x: jax.Array) -> jax.Array:
        return (matrix * x).sum(-1)

    return lax.custom_linear_solve(product, b, lambda _, b: _eliminate(matrix, b), lambda _, b: _eliminate(matrix.T, b))


def _eliminate(matrix: jax.Array, b: jax.Array) -> jax.Array:
    """Gauss-Jordan elimination; without pivoting, which a diagonal that dominates rows or columns makes stable."""
    rows = jnp.arange(b.size)[:, None]

    def clear_column(i: int | jax.Array, system: jax.Array) -> jax.Array:
        pivot = system[i] / system[i, i]
        return jnp.where(rows == i, pivot, system - system[:, i, None] * pivot)

    system = jnp.concatenate([matrix, b[:, None]], axis=1)
    if b.size <= UNROLLED:
        for i in range(b.size):
            system = clear_column(i, system)
    else:
        system = lax.fori_loop(0, b.size, clear_column, system)
    return system[:, -1]
