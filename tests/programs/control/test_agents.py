"""Settings for which there are no golden numbers, against independent implementations in numpy or plain jax: the
formulas written once more, with networks, Adam and dense solves of their own, in 64 bits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejax_bilevel.configuration import replace
from purejax_bilevel.networks import Layer
from purejax_bilevel.programs.control import agents
from purejax_bilevel.programs.control.q_learning import Config
from purejax_bilevel.replay import Batch

pytestmark = pytest.mark.usefixtures("float64")

OBS, ACTIONS, BATCH = 3, 2, 10
ALPHA, DISCOUNT = 0.3, 0.9


def settings(**changes: Any) -> Config:
    config = Config(hidden_dim=4, model_hidden_dim=3, alpha=ALPHA, discount=DISCOUNT, **changes).resolved()
    return replace(config, max_hidden_dim=4, max_model_hidden_dim=3)


def random_learner(config: Config) -> agents.Learner:
    """Networks without a zero in them; the target differs from the Q-function."""
    learner = agents.init_learner(config, jax.random.key(0), OBS, ACTIONS)
    random = np.random.default_rng(0)
    jitter = lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape)  # noqa: E731
    return learner.replace(
        **{name: jax.tree.map(jitter, getattr(learner, name)) for name in ("q", "target_q", "model")}
    )


def random_batch(seed: int = 1) -> Batch:
    random = np.random.default_rng(seed)
    action = np.eye(ACTIONS)[random.integers(ACTIONS, size=BATCH)].T
    normal = lambda *shape: random.standard_normal(shape)  # noqa: E731
    fields = (normal(OBS, BATCH), action, normal(BATCH), normal(OBS, BATCH), (np.arange(BATCH) % 3 == 0).astype(float))
    return Batch(*map(jnp.asarray, (*fields, normal(OBS, BATCH))))


def network(layers: Any, inputs: Any) -> Any:
    for kernel, bias in layers[:-1]:
        inputs = jnp.maximum(kernel.T @ inputs + bias[:, None], 0.0)
    return layers[-1][0].T @ inputs + layers[-1][1][:, None]


def targets(target_q: Any, batch: Batch, next_obs: Any, reward: Any) -> Any:
    smallest = jnp.minimum(*(network(head, next_obs) for head in target_q))
    value = ALPHA * jnp.log(jnp.exp(smallest / ALPHA).sum(0))
    return reward + DISCOUNT * (1 - batch.terminated) * value


def taken_values(head: Any, batch: Batch) -> Any:
    return (network(head, batch.obs) * batch.action).sum(0)


def modelled(model: Any, batch: Batch, probabilistic: bool = False) -> tuple[Any, Any]:
    inputs = jnp.concatenate([batch.obs, batch.action])
    next_obs = network(model.next_obs, inputs)
    if probabilistic:
        next_obs = next_obs[:OBS] + jnp.exp(jnp.clip(next_obs[OBS:], -5, 2)) * batch.noise
    return next_obs, network(model.reward, inputs)[0]


def critic_loss(q: Any, target: Any, batch: Batch) -> Any:
    return 0.5 * sum(((taken_values(head, batch) - target) ** 2).mean() for head in q)


def assert_same(own: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Each leaf relative to its own largest entry, and none of them zero."""
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


# --- hypergradients ---------------------------------------------------------------------------------------------------


def test_funcbo_moves_the_values_with_the_targets_of_the_model():
    """The inner solution in function space is the model's target itself: dF/dtheta = sum dF/dq dy/dtheta."""
    config, batch = settings(agent_type="funcbo"), random_batch()
    learner = random_learner(config)

    def by_hand() -> Any:
        target = targets(learner.target_q, batch, batch.next_obs, batch.reward)
        errors = sum((taken_values(head, batch) - target) / BATCH for head in learner.q)
        return jax.grad(lambda model: errors @ targets(learner.target_q, batch, *modelled(model, batch)))(learner.model)

    losses, own, _ = jax.jit(lambda: agents.hypergradient_funcbo(config, learner, batch))()
    assert_same(own, jax.jit(by_hand)())
    real = targets(learner.target_q, batch, batch.next_obs, batch.reward)
    np.testing.assert_allclose(losses["model_loss"], critic_loss(learner.q, real, batch), rtol=1e-12)


def test_a_probabilistic_model_is_differentiated_through_its_sample():
    config, batch = settings(agent_type="omd", prob_model=True), random_batch()
    learner = random_learner(config)

    def by_hand() -> Any:
        real = targets(learner.target_q, batch, batch.next_obs, batch.reward)
        direction = jax.grad(critic_loss)(learner.q, real, batch)

        def slope(model: Any) -> Any:
            target = targets(learner.target_q, batch, *modelled(model, batch, probabilistic=True))
            return jax.jvp(lambda q: critic_loss(q, target, batch), (learner.q,), (direction,))[1]

        return jax.tree.map(jnp.negative, jax.grad(slope)(learner.model))

    own = jax.jit(lambda: agents.hypergradient_omd(config, learner, batch)[1])()
    assert_same(own, jax.jit(by_hand)())


def test_the_likelihood_of_a_probabilistic_model():
    config, batch = settings(agent_type="mle", prob_model=True), random_batch()
    learner = random_learner(config)

    def by_hand(model: Any) -> Any:
        inputs = jnp.concatenate([batch.obs, batch.action])
        outputs = network(model.next_obs, inputs)
        log_std = jnp.clip(outputs[OBS:], -5, 2)
        squared = (batch.next_obs - outputs[:OBS]) ** 2 / jnp.exp(2 * log_std)
        likelihood = 0.5 * squared + log_std + 0.5 * np.log(2 * np.pi)
        return likelihood.sum() / BATCH + ((network(model.reward, inputs)[0] - batch.reward) ** 2).mean()

    def own(model: Any) -> Any:
        predicted = agents.predict(config, model, batch)
        return agents.likelihood_loss(config, learner.replace(model=model), batch, predicted)

    results = jax.jit(lambda: [jax.value_and_grad(loss)(learner.model) for loss in (own, by_hand)])()
    assert_same(*results)


# --- optimisers -------------------------------------------------------------------------------------------------------


def adam(params: list, gradient: list, moments: tuple[int, list, list], rate: float) -> tuple[list, tuple]:
    """One step of Adam in numpy, on lists of arrays."""
    count, first, second = moments[0] + 1, moments[1], moments[2]
    first = [0.9 * m + 0.1 * g for m, g in zip(first, gradient, strict=True)]
    second = [0.999 * v + 0.001 * g**2 for v, g in zip(second, gradient, strict=True)]
    new = [
        p - rate * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
        for p, m, v in zip(params, first, second, strict=True)
    ]
    return new, (count, first, second)


def arrays(tree: Any) -> list:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("changes", [{}, {"warm_opt": True}, {"no_warm": True}], ids=str)
def test_inner_solution(changes: dict[str, Any]):
    """Three Adam steps on one model batch: fresh or carried moments, a carried or a fresh Q-function."""
    config = settings(agent_type="omd", num_Q_steps=3, inner_lr=0.01, tau=0.1, **changes)
    learner, batch = random_learner(config), random_batch()
    moments = [jax.tree.map(lambda leaf, s=s: s + jnp.abs(leaf), learner.q) for s in (0.1, 0.2)]
    used = learner.q_optimizer[0]._replace(count=jnp.int32(5), mu=moments[0], nu=moments[1])
    learner = learner.replace(q_optimizer=(used, *learner.q_optimizer[1:]))
    predicted = agents.predict(config, learner.model, batch)
    key = jax.random.key(7)
    own, losses = jax.jit(lambda: agents.solve_inner(config, learner, predicted, jax.random.clone(key)))()

    q, target_q = learner.q, learner.target_q
    if config.no_warm:
        q = target_q = agents.init_q(config, key, OBS, ACTIONS)
    structure = jax.tree.structure(q)
    differentiate = jax.jit(
        jax.value_and_grad(
            lambda q, target_q: critic_loss(
                q, jax.lax.stop_gradient(targets(target_q, batch, *modelled(learner.model, batch))), batch
            )
        )
    )
    state = (5, arrays(moments[0]), arrays(moments[1]))
    if not config.warm_opt:
        state = (0, [np.zeros_like(a) for a in arrays(q)], [np.zeros_like(a) for a in arrays(q)])
    for _ in range(3):
        loss, gradient = differentiate(q, target_q)
        new, state = adam(arrays(q), arrays(gradient), state, 0.01)
        q = jax.tree.unflatten(structure, new)
        target_q = jax.tree.map(lambda t, p: 0.9 * t + 0.1 * p, target_q, q)
    assert_same(own.q, q)
    assert_same(own.target_q, target_q)
    np.testing.assert_allclose(losses["q_loss"], loss, rtol=1e-9)


@pytest.mark.parametrize("smoothing", ["window", "ema"])
def test_the_model_follows_the_smoothed_hypergradient(smoothing: str):
    window, beta, rate = 4, 0.3, 0.01
    config = settings(agent_type="omd", smoothing=smoothing, smoothing_window=window, beta=beta, lr=rate)
    config = replace(config, max_smoothing_window=6)
    params = {"a": jnp.asarray([1.0, -2.0])}
    gradients = np.random.default_rng(3).standard_normal((11, 2))
    optimizer = agents.model_optimizer(config)
    state = optimizer.init(params)  # type: ignore[arg-type]
    expected, moments = [np.asarray(params["a"])], (0, [np.zeros(2)], [np.zeros(2)])
    decay = 1 - 2 / (window + 1)
    step = jax.jit(lambda g, state, t: optimizer.update({"a": g}, state, step=t))
    for t in range(11):
        updates, state = step(gradients[t], state, jnp.int32(t))
        params = optax.apply_updates(params, updates)
        seen = gradients[: t + 1][::-1]
        weights = decay ** np.arange(t + 1.0) if smoothing == "ema" else (np.arange(t + 1) < window).astype(float)
        smoothed = beta * gradients[t] + (1 - beta) * (weights @ seen) / weights.sum()
        expected, moments = adam(expected, [smoothed], moments, rate)
        np.testing.assert_allclose(params["a"], expected[0], rtol=1e-10)


# --- the linear solver, where its problem is well conditioned ---------------------------------------------------------


def linear_problem() -> tuple[Config, agents.Learner, Batch]:
    """Linear Q-function and model on orthogonal inputs: the Hessian has the eigenvalues 1 and 0.001 and no others, so
    that conjugate gradients end after two steps, exactly."""
    config = replace(settings(agent_type="omd", no_double=True), hidden_dim=0, max_hidden_dim=0)
    random = np.random.default_rng(4)
    signs = np.array([[(-1.0) ** bin(i & j).count("1") for i in range(8)] for j in (1, 2, 4)])  # orthogonal to 1 too
    obs = np.tile(signs * np.array([1.0, np.sqrt(1e-3), np.sqrt(1e-3)])[:, None], 2)
    action = np.repeat(np.eye(2), 8, axis=1)
    fields = (obs, action, random.normal(size=16), random.normal(size=(3, 16)), (np.arange(16) % 5 == 0).astype(float))
    layer = lambda i, o: (Layer(jnp.asarray(random.normal(size=(i, o))), jnp.asarray(random.normal(size=o))),)  # noqa: E731
    q, target_q = ((layer(3, 2),) for _ in range(2))
    learner = random_learner(settings(agent_type="omd")).replace(
        q=q, target_q=target_q, model=agents.Model(layer(5, 3), layer(5, 1))
    )
    return config, learner, Batch(*map(jnp.asarray, fields))


def linear_hypergradient(learner: agents.Learner, batch: Batch, damping: float, scale: float = 1.0) -> list[np.ndarray]:
    """In numpy: the damped Hessian as a matrix, solved, times the gradients of the targets."""
    batch, q, target_q, model = (
        jax.tree.map(np.asarray, x) for x in (batch, learner.q, learner.target_q, learner.model)
    )
    count = batch.reward.size
    ones = np.ones((1, count))
    features = np.einsum("an,fn->afn", batch.action, np.concatenate([batch.obs, ones])).reshape(8, count)
    inputs = np.concatenate([batch.obs, batch.action, ones])
    (kernel, bias), (target_kernel, target_bias) = q[0][0], target_q[0][0]
    not_done = DISCOUNT * (1 - batch.terminated)

    def value(next_obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        exponential = np.exp((target_kernel.T @ next_obs + target_bias[:, None]) / ALPHA)
        return ALPHA * np.log(exponential.sum(0)), exponential / exponential.sum(0)

    real = batch.reward + not_done * value(batch.next_obs)[0]
    errors = (batch.action * (kernel.T @ batch.obs + bias[:, None])).sum(0) - real
    hessian = scale * 2 / count * features @ features.T + damping * np.eye(8)
    adjoint = np.linalg.solve(hessian, 2 / count * features @ errors)
    along = 2 / count * adjoint @ features
    layer = model.next_obs[0]
    _, policy = value(layer.kernel.T @ inputs[:5] + layer.bias[:, None])
    of_next_obs = inputs @ (along * not_done * (target_kernel @ policy)).T
    of_reward = inputs @ along[:, None]
    return [of_next_obs[:5], of_next_obs[5], of_reward[:5], of_reward[5]]


@pytest.mark.parametrize("solver", ["cg", "dense"])
def test_hypergradient_by_a_linear_solver_is_sharp(solver: str):
    """A damping of 1.1e-5 for 1e-5, or a Hessian wrong by 1e-4, is a hundred times what is allowed."""
    config, learner, batch = linear_problem()
    config = replace(config, with_inv_jac=solver)
    assert config.damping == 1e-5
    own = jax.tree.leaves(jax.jit(lambda: agents.hypergradient_omd(config, learner, batch)[1])())
    expected = linear_hypergradient(learner, batch, 1e-5)
    assert_same(own, expected, rtol=1e-8)
    for wrong in (linear_hypergradient(learner, batch, 1.1e-5), linear_hypergradient(learner, batch, 1e-5, 1.0001)):
        distances = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(wrong, expected, strict=True)]
        assert max(distances) > 1e-6
