"""Proximal policy optimisation with any optimiser, as pure functions of one agent.

    task = tasks.make(config)
    rule = update_rules.make(config, weights)
    state = init(key, config, task, rule)
    for t in 0 .. horizon - 1:
        state, metrics = iteration(state, config, task, rule, t)    a rollout, and num_epochs passes over it

Rates and weights of the optimiser may be traced and the functions mapped over them. `task.params` may be traced too
(a level of a Grid-World). Sources: Schulman et al. 2017 (PPO) and 2016 (GAE); the loss is that of PureJaxRL.
"""

from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax

from purejax_bilevel.program import Metrics
from purejax_bilevel.programs.learned_optimizers import actor_critic, normalisation
from purejax_bilevel.programs.learned_optimizers.actor_critic import Task, Tree
from purejax_bilevel.programs.learned_optimizers.optimizer import batch_clock, training_clock
from purejax_bilevel.programs.learned_optimizers.settings import PPO

# Named streams of random numbers; a constant each, so that adding one moves no other.
NETWORKS, ENVIRONMENTS, ITERATION = range(3)  # of an agent
COLLECT, LEARN = range(2)  # of an iteration
ACT, STEP = range(2)  # of a step
PERMUTATION, NOISE = range(2)  # of an epoch

ADVANTAGE_FLOOR = 1e-8

Rule: TypeAlias = optax.GradientTransformationExtraArgs


class Episodes(NamedTuple):
    """Returns of each copy of the environment `[envs]`."""

    running: jax.Array  # of the episode that goes on
    last: jax.Array  # of the last one that ended; 0 before


class Learner(NamedTuple):
    """What the optimiser changes."""

    params: Tree  # actor and critic
    optimizer: optax.OptState


class State(flax.struct.PyTreeNode):
    """Everything an agent carries from iteration to iteration."""

    key: jax.Array
    obs: jax.Array  # [envs, obs], normalised
    environment: Any
    episodes: Episodes
    normaliser: normalisation.Normaliser
    learner: Learner


class Rollout(NamedTuple):
    """Experience, time first: `[steps, envs, ...]`; a batch has one leading dimension."""

    obs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    next_value: jax.Array  # of the last observation of an episode where it ended
    reward: jax.Array
    terminated: jax.Array  # what comes is worth nothing
    done: jax.Array  # the episode ended, whyever


class OnPolicyBatch(NamedTuple):
    """What the loss reads, `[batch, ...]`."""

    obs: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    advantage: jax.Array
    target: jax.Array


def init(key: jax.Array, config: PPO, task: Task, rule: Rule) -> State:
    """An agent before its first iteration; the key becomes its own."""
    keys = jax.random.split(jax.random.fold_in(key, ENVIRONMENTS), config.num_envs)
    obs, environment = jax.vmap(task.environment.reset, (0, None))(keys, task.params)
    normaliser, obs = normalisation.init(config, obs.astype(jnp.result_type(float)))
    params = actor_critic.init(jax.random.fold_in(key, NETWORKS), config, task)
    zeros = jnp.zeros(config.num_envs)
    return State(key, obs, environment, Episodes(zeros, zeros), normaliser, Learner(params, rule.init(params)))


def iteration(state: State, config: PPO, task: Task, rule: Rule, t: jax.Array, horizon: int) -> tuple[State, Metrics]:
    """A rollout and the epochs over it.

    Args:
        state: of one agent.
        config: of that agent.
        task: the environment.
        rule: the optimiser, of `update_rules.make`.
        t: number of the iteration.
        horizon: iterations in all, for annealing and OPEN's clock.

    Returns:
        The state, and what was measured: means over the optimiser's steps, the return of the episodes that ended.
    """
    key = jax.random.fold_in(jax.random.fold_in(state.key, ITERATION), t)
    state, rollout, metrics = collect(state, config, task, jax.random.fold_in(key, COLLECT))
    learn_key = jax.random.fold_in(key, LEARN)
    learner, losses = learn(state.learner, config, rule, batch_of(rollout, config), t, horizon, learn_key)
    one = jnp.ones(())
    return state.replace(learner=learner), metrics | {name: (loss, one) for name, loss in losses.items()}


# --- experience -------------------------------------------------------------------------------------------------------


def collect(state: State, config: PPO, task: Task, key: jax.Array) -> tuple[State, Rollout, Metrics]:
    """Steps all copies of the environment with the policy."""

    def step(state: State, i: jax.Array) -> tuple[State, tuple[Rollout, jax.Array]]:
        return _step(state, config, task, jax.random.fold_in(key, i))

    state, (rollout, ended) = jax.lax.scan(step, state, jnp.arange(config.num_steps))
    if config.truncation_is_end:
        last = actor_critic.value(state.learner.params, state.obs, config.activation)
        rollout = rollout._replace(next_value=jnp.concatenate([rollout.value[1:], last[None]]))
    return state, rollout, {"training_return": (ended.sum(), rollout.done.sum())}


def _step(state: State, config: PPO, task: Task, key: jax.Array) -> tuple[State, tuple[Rollout, jax.Array]]:
    """One step of all copies; also the returns of the episodes that ended in it, else 0."""
    params, dtype = state.learner.params, state.obs.dtype
    policy = actor_critic.policy(params, state.obs, config.activation)
    action = actor_critic.sample(policy, jax.random.fold_in(key, ACT))
    keys = jax.random.split(jax.random.fold_in(key, STEP), config.num_envs)
    step = jax.vmap(task.environment.step, (0, 0, 0, None))
    obs, environment, reward, terminated, truncated, info = step(keys, state.environment, action, task.params)
    done = (terminated | truncated).astype(dtype)
    running = state.episodes.running + reward.astype(dtype)
    normaliser, next_obs = normalisation.observe(state.normaliser, obs.astype(dtype))
    normaliser, scaled = normalisation.reward(normaliser, reward.astype(dtype), done, config.discount)
    value = actor_critic.value(params, state.obs, config.activation)
    next_value = jnp.zeros_like(value)
    if not config.truncation_is_end:
        final = normalisation.observations(normaliser, info["final_observation"].astype(dtype))
        next_value = actor_critic.value(params, final, config.activation)
    is_end = done if config.truncation_is_end else terminated.astype(dtype)
    log_prob = actor_critic.log_prob(policy, action)
    seen = Rollout(state.obs, action, log_prob, value, next_value, scaled, is_end, done)
    episodes = Episodes((1.0 - done) * running, jnp.where(done > 0, running, state.episodes.last))
    state = state.replace(obs=next_obs, environment=environment, episodes=episodes, normaliser=normaliser)
    return state, (seen, done * running)


def advantages(rollout: Rollout, discount: jax.Array | float, gae_lambda: jax.Array | float) -> jax.Array:
    """Generalised advantage estimates `[steps, envs]` (Schulman et al. 2016, equation 16).

    Episodes are cut apart where one is done; what comes after a termination is worth nothing, after a truncation it is
    worth the value of the last observation.
    """
    errors = rollout.reward + discount * rollout.next_value * (1.0 - rollout.terminated) - rollout.value
    decay = discount * gae_lambda * (1.0 - rollout.done)

    def add(following: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        advantage = step[0] + step[1] * following
        return advantage, advantage

    return jax.lax.scan(add, jnp.zeros_like(errors[0]), (errors, decay), reverse=True)[1]


def batch_of(rollout: Rollout, config: PPO) -> OnPolicyBatch:
    """What is learned from a rollout, `[steps x envs, ...]`, time first."""
    advantage = advantages(rollout, config.discount, config.gae_lambda)
    batch = OnPolicyBatch(
        rollout.obs, rollout.action, rollout.log_prob, rollout.value, advantage, advantage + rollout.value
    )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)


# --- learning ---------------------------------------------------------------------------------------------------------


def learn(
    learner: Learner, config: PPO, rule: Rule, batch: OnPolicyBatch, t: jax.Array, horizon: int, key: jax.Array
) -> tuple[Learner, dict[str, jax.Array]]:
    """All epochs of iteration `t` over a batch; also means over the optimiser's steps."""
    size = config.num_envs * config.num_steps

    def one(learner: Learner, number: jax.Array) -> tuple[Learner, dict[str, jax.Array]]:
        own = jax.random.fold_in(key, number)
        permutation = jax.random.permutation(jax.random.fold_in(own, PERMUTATION), size)
        steps = (t * config.num_epochs + number) * config.num_minibatches + jnp.arange(config.num_minibatches)
        clues = clues_of(steps, config, horizon)
        return epoch(learner, config, rule, batch, permutation, clues, jax.random.fold_in(own, NOISE))

    learner, losses = jax.lax.scan(one, learner, jnp.arange(config.num_epochs))
    return learner, jax.tree.map(jnp.mean, losses)


def clues_of(steps: jax.Array, config: PPO, horizon: int) -> dict[str, jax.Array]:
    """What optimisers may know of steps `[...]`, counted from 0: `progress` anneals rates, the clocks are OPEN's."""
    sizes = config.num_epochs, config.num_minibatches
    iterations = (steps // (sizes[0] * sizes[1])).astype(jnp.result_type(float))
    clues = {"progress": iterations / horizon}
    if horizon > 1:
        clues["training_clock"] = training_clock(steps, horizon, *sizes)
    if config.num_epochs > 1:
        clues["batch_clock"] = batch_clock(steps, *sizes)
    return clues


def epoch(
    learner: Learner,
    config: PPO,
    rule: Rule,
    batch: OnPolicyBatch,
    permutation: jax.Array,
    clues: Tree,
    key: jax.Array | None = None,
) -> tuple[Learner, dict[str, jax.Array]]:
    """One pass over a batch.

    Args:
        learner: before it.
        config: of the agent.
        rule: the optimiser.
        batch: `[batch, ...]`.
        permutation: order of its rows `[batch]`, cut into consecutive minibatches.
        clues: further arguments of the optimiser, `[minibatches, ...]`.
        key: of the optimiser's noise; None: it has none, or it is among the clues.

    Returns:
        The learner, and what was measured in each step `[minibatches]`.
    """

    def one(learner: Learner, step: tuple[jax.Array, jax.Array, Tree]) -> tuple[Learner, dict[str, jax.Array]]:
        number, rows, own = step
        own = own if key is None else own | {"key": jax.random.fold_in(key, number)}
        return minibatch_step(learner, config, rule, jax.tree.map(lambda leaf: leaf[rows], batch), own)

    rows = permutation.reshape(config.num_minibatches, -1)
    return jax.lax.scan(one, learner, (jnp.arange(config.num_minibatches), rows, clues))


def minibatch_step(
    learner: Learner, config: PPO, rule: Rule, minibatch: OnPolicyBatch, clues: Tree
) -> tuple[Learner, dict[str, jax.Array]]:
    """One step of the optimiser, and what was measured in it."""
    gradients, (activations, measured) = jax.grad(loss, has_aux=True)(learner.params, config, minibatch)
    clipped, norms = clip_each(gradients, config.max_gradient_norm)
    updates, optimizer = rule.update(clipped, learner.optimizer, learner.params, activations=activations, **clues)
    measured |= norms | {
        "dormant_share": actor_critic.dormant_share(activations),
        "update_norm": optax.tree.norm(updates),
    }
    return Learner(optax.apply_updates(learner.params, updates), optimizer), measured


def clip_each(gradients: Tree, largest: jax.Array | float) -> tuple[Tree, dict[str, jax.Array]]:
    """Gradients of actor and critic, each scaled to a norm of at most `largest`; and their norms before."""
    norms = {name: optax.tree.norm(network) for name, network in gradients.items()}
    scales = {name: jnp.where(norm < largest, 1.0, largest / norm) for name, norm in norms.items()}
    clipped = {name: optax.tree.scale(scales[name], network) for name, network in gradients.items()}
    return clipped, {f"{name}_gradient_norm": norm for name, norm in norms.items()}


def loss(params: Tree, config: PPO, batch: OnPolicyBatch) -> tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]:
    """The loss of PPO with clipped values, advantages normalised over the minibatch.

    Returns:
        The total, and with it the mean activation sizes of both networks and the parts of the loss.
    """
    outputs, actor_sizes = actor_critic.apply(params["actor"], batch.obs, config.activation)
    values, critic_sizes = actor_critic.apply(params["critic"], batch.obs, config.activation)
    policy = actor_critic.Policy(outputs, params["actor"].get("log_std"))
    log_ratio = actor_critic.log_prob(policy, batch.action) - batch.log_prob
    policy_loss = _policy_loss(log_ratio, batch.advantage, config.clip)
    value_loss = _value_loss(values[:, 0], batch, config.value_clip)
    entropy = actor_critic.entropy(policy).mean()
    total = policy_loss + config.value_weight * value_loss - config.entropy_weight * entropy
    measured = {
        "loss": total,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "clipped_share": (jnp.abs(jnp.expm1(log_ratio)) > config.clip).mean(dtype=total.dtype),
        "divergence": (jnp.expm1(log_ratio) - log_ratio).mean(),
    }
    return total, ({"actor": actor_sizes, "critic": critic_sizes}, measured)


def _policy_loss(log_ratio: jax.Array, advantage: jax.Array, clip: jax.Array | float) -> jax.Array:
    normal = (advantage - advantage.mean()) / (advantage.std() + ADVANTAGE_FLOOR)
    ratio = jnp.exp(log_ratio)
    return -jnp.minimum(ratio * normal, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * normal).mean()


def _value_loss(values: jax.Array, batch: OnPolicyBatch, clip: jax.Array | float) -> jax.Array:
    clipped = batch.value + jnp.clip(values - batch.value, -clip, clip)
    return 0.5 * jnp.maximum((values - batch.target) ** 2, (clipped - batch.target) ** 2).mean()
