"""Environment steps per second of PPO, beside the structure of a well-known single file, and beside matrix products.

    python tests/benchmarks/ppo_speed.py [--env_name Breakout-MinAtar] [--members 1 8 64] [--optimizer adam]

64 environments, 128 steps, 4 epochs of 8 minibatches, two hidden layers of 64 units. Compared are, in turn in one
process:

* `this`: iterations of `ppo.iteration`, members one after the other on a CPU, at once elsewhere;
* `single file`: the same algorithm in the structure of PureJaxRL's ppo.py (Lu et al. 2022): one flax network with two
  trunks, an optax chain in a TrainState, distrax's distributions, the whole batch shuffled in each epoch, `vmap` over
  members;
* `matrix products`: those of the learning alone, at the rate that this machine has for products of these sizes.

Printed are medians, by the clock and of the process's CPU time, all members together.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from purejax_bilevel.programs.learned_optimizers import ppo, tasks, update_rules
from purejax_bilevel.programs.learned_optimizers.program import Config

Run = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--env_name", default="Breakout-MinAtar")
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = Config(env_name=options.env_name, optimizer=options.optimizer, truncation_is_end=True).resolved()
    print(f"{config.env_name}, {config.optimizer}, {jax.default_backend()}: steps/s by the clock, and of CPU time")
    for members in options.members:
        for name, rates in measure(config, members, options.repeats).items():
            print(f"    {members:3} members, {name:<16} {rates[0]:10.0f} {rates[1]:10.0f}")


def measure(config: Config, members: int, repeats: int) -> dict[str, np.ndarray]:
    """Steps of the environment per second of the clock and of CPU time, `[2]`, of each variant."""
    runs = {"this": of_this(config, members), "single file": of_a_single_file(config, members)}
    runs["matrix products"] = of_products(config, members)
    times: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first compiles
        for name, run in runs.items():
            begin = np.array([time.perf_counter(), time.process_time()])
            jax.block_until_ready(run())
            times[name].append(np.array([time.perf_counter(), time.process_time()]) - begin)
    steps = members * config.num_envs * config.num_steps
    return {name: steps / np.median(own[1:], axis=0) for name, own in times.items()}


def mapped(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Over members, as runs do it."""
    return (lambda x: jax.lax.map(function, x)) if jax.default_backend() == "cpu" else jax.vmap(function)


def advancing(init: Callable[[Any], Any], step: Callable[[Any], Any], members: int) -> Run:
    """Calls `step` on what it returned before."""
    state = jax.jit(init)(jax.random.split(jax.random.key(0), members))
    compiled = jax.jit(step, donate_argnums=0)

    def run() -> Any:
        nonlocal state
        state = compiled(state)
        return state

    return run


def of_this(config: Config, members: int) -> Run:
    task = tasks.make(config)
    rule = update_rules.make(config, update_rules.load(config.model) if config.model else None)
    init = mapped(lambda key: ppo.init(key, config, task, rule))
    step = mapped(lambda state: ppo.iteration(state, config, task, rule, jnp.int32(3), config.horizon)[0])
    return advancing(init, step, members)


def of_products(config: Config, members: int) -> Run:
    """The products of forward and backward passes: two per layer, and another where the input has a gradient."""
    task = tasks.make(config)
    rows = config.num_envs * config.num_steps // config.num_minibatches
    layers = [(task.obs_dim, config.hidden_dim), *[(config.hidden_dim,) * 2] * (config.num_layers - 1)]
    passes = 2 * config.num_epochs * config.num_minibatches * members  # actor and critic

    def one(_: Any, kernels: Any) -> Any:
        def layer(kernel: jax.Array, is_first: bool) -> jax.Array:
            inputs = jnp.broadcast_to(kernel[:1, :1], (rows, len(kernel))) + jnp.ones((rows, len(kernel)))
            outputs = inputs @ kernel
            scale = 0.0 if is_first else (outputs @ kernel.T).sum() * 1e-20
            return kernel + 1e-20 * (inputs.T @ outputs) + scale

        return [layer(kernel, index == 0) for index, kernel in enumerate(kernels)]

    kernels = [jnp.ones(sizes) / sizes[0] for sizes in layers]
    compiled = jax.jit(lambda kernels: jax.lax.fori_loop(0, passes, one, kernels))
    return lambda: compiled(kernels)


# --- the structure of a single file -----------------------------------------------------------------------------------


class Network(nn.Module):
    actions: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[Any, jax.Array]:
        def trunk(x: jax.Array, outputs: int, gain: float) -> jax.Array:
            for _ in range(2):
                x = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))(x))
            return nn.Dense(outputs, kernel_init=nn.initializers.orthogonal(gain))(x)

        return distrax.Categorical(logits=trunk(x, self.actions, 0.01)), trunk(x, 1, 1.0)[..., 0]


class Transition(NamedTuple):
    done: jax.Array
    action: jax.Array
    value: jax.Array
    reward: jax.Array
    log_prob: jax.Array
    obs: jax.Array


def of_a_single_file(config: Config, members: int) -> Run:
    task = tasks.make(config)
    network = Network(task.num_actions, config.hidden_dim)
    anneal = lambda count: config.lr * (1.0 - (count // (config.num_minibatches * config.num_epochs)) / config.horizon)  # noqa: E731
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(anneal, eps=1e-5))

    def init(key: jax.Array) -> Any:
        net_key, reset_key, key = jax.random.split(key, 3)
        keys = jax.random.split(reset_key, config.num_envs)
        obs, environment = jax.vmap(task.environment.reset, (0, None))(keys, task.params)
        params = network.init(net_key, obs[:1])
        return TrainState.create(apply_fn=network.apply, params=params, tx=optimizer), environment, obs, key

    def env_step(carry: Any, _: Any) -> Any:
        train, environment, obs, key = carry
        key, action_key, step_key = jax.random.split(key, 3)
        policy, value = network.apply(train.params, obs)
        action = policy.sample(seed=action_key)
        step = jax.vmap(task.environment.step, (0, 0, 0, None))
        keys = jax.random.split(step_key, config.num_envs)
        new_obs, environment, reward, terminated, truncated, _ = step(keys, environment, action, task.params)
        seen = Transition(terminated | truncated, action, value, reward, policy.log_prob(action), obs)
        return (train, environment, new_obs, key), seen

    def advantages(seen: Transition, last: jax.Array) -> jax.Array:
        def one(carry: Any, transition: Transition) -> Any:
            gae, next_value = carry
            going_on = 1.0 - transition.done
            delta = transition.reward + config.discount * next_value * going_on - transition.value
            gae = delta + config.discount * config.gae_lambda * going_on * gae
            return (gae, transition.value), gae

        return jax.lax.scan(one, (jnp.zeros_like(last), last), seen, reverse=True, unroll=16)[1]

    def loss(params: Any, seen: Transition, gae: jax.Array, target: jax.Array) -> jax.Array:
        policy, value = network.apply(params, seen.obs)
        clipped = seen.value + (value - seen.value).clip(-config.clip, config.clip)
        value_loss = 0.5 * jnp.maximum((value - target) ** 2, (clipped - target) ** 2).mean()
        ratio = jnp.exp(policy.log_prob(seen.action) - seen.log_prob)
        gae = (gae - gae.mean()) / (gae.std() + 1e-8)
        gain = jnp.minimum(ratio * gae, jnp.clip(ratio, 1.0 - config.clip, 1.0 + config.clip) * gae).mean()
        return -gain + config.value_weight * value_loss - config.entropy_weight * policy.entropy().mean()

    def minibatch(train: TrainState, batch: Any) -> Any:
        return train.apply_gradients(grads=jax.grad(loss)(train.params, *batch)), None

    def epoch(carry: Any, _: Any) -> Any:
        train, batch, key = carry
        key, own = jax.random.split(key)
        size = config.num_envs * config.num_steps
        order = jax.random.permutation(own, size)
        flat = jax.tree.map(lambda x: jnp.take(x.reshape(size, *x.shape[2:]), order, axis=0), batch)
        cut = jax.tree.map(lambda x: x.reshape(config.num_minibatches, -1, *x.shape[1:]), flat)
        return (jax.lax.scan(minibatch, train, cut)[0], batch, key), None

    def iteration(carry: Any) -> Any:
        (train, environment, obs, key), seen = jax.lax.scan(env_step, carry, None, config.num_steps)
        gae = advantages(seen, network.apply(train.params, obs)[1])
        (train, _, key), _ = jax.lax.scan(epoch, (train, (seen, gae, gae + seen.value), key), None, config.num_epochs)
        return train, environment, obs, key

    # One start after the other: orthogonal kernels come from LAPACK, which can lock up in a batch.
    return advancing(lambda keys: jax.lax.map(init, keys), jax.vmap(iteration), members)


if __name__ == "__main__":
    main()
