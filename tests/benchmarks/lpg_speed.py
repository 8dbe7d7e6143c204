"""Cost of LPG's meta-training, in processor time: members, memory, and rows of kernels against one-hot products.

    python tests/benchmarks/lpg_speed.py                               # 1, 4 and 16 members, then the ratios
    python tests/benchmarks/lpg_speed.py --members 1 --lpg_gru_width 32
    python tests/benchmarks/lpg_speed.py --members --env_name GridWorld-small-0   # the ratios alone

Processor time of all threads is counted, so that other work on the machine matters little; the rate at which the same
cores multiply matrices of the objective's shape is measured in the same run. The plain version is the same program
whose agents see the whole one-hot vector, as in the released code: rollouts keep it, and every layer multiplies it. All
agents live on one level, since drawing others takes long to compile and almost no time of a meta-step.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel import UserError  # first: this lets jax use all cores
from purejax_bilevel.program import alone
from purejax_bilevel.programs.meta_objectives import learners, meta_gradient, network, population, worlds
from purejax_bilevel.programs.meta_objectives.program import Config
from purejax_bilevel.programs.meta_objectives.worlds import World
from purejax_bilevel.runtime import devices
from purejax_bilevel.runtime.compiled import CompiledProgram, mesh_of
from purejax_bilevel.studies import run as runs

ENDLESS = 10**9
BACKWARD = 4  # forward passes of the objective that a meta-gradient costs: itself, again, and two for derivatives


def processor_seconds(function: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Of one call, and what it gives."""
    before = time.process_time()
    found = jax.block_until_ready(function(*given))
    return time.process_time() - before, found


# --- members ----------------------------------------------------------------------------------------------------------


def product_rate(rows: int, width: int) -> float:
    """GFLOP per second of processor time of chained products of a `rows x width` matrix with a square one."""
    products = int(4e9) // (2 * rows * width**2)
    first, square = np.ones((rows, width), np.float32), np.eye(width, dtype=np.float32)
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, products, lambda _, x: x @ w, x))
    chain(first, square).block_until_ready()
    taken = np.median([processor_seconds(chain, first, square)[0] for _ in range(3)])
    return products * 2 * rows * width**2 / float(taken) / 1e9


def shapes_of(config: Config) -> network.Weights:
    """Shapes of the objective."""
    return network.shapes(config.lpg_target_width, config.lpg_embedding_net_width, config.lpg_gru_width, False)


def objective_flops(config: Config) -> float:
    """Floating-point operations of the objective's own products in a meta-step of one agent."""
    kernels = sum(2 * int(np.prod(shape)) for shape in shapes_of(config) if len(shape) == 2)
    return BACKWARD * kernels * config.num_agent_updates * config.env_workers * config.train_rollout_len


def measure_members(config: Config, members: int, steps: int, repeats: int) -> None:
    """Prints speed and memory of a run with so many members."""
    part = runs.make_part(config, members, 0)
    mesh = mesh_of([part])
    program = CompiledProgram([part], mesh, devices.default_member_batch(mesh))
    program.compile()
    state, _, _ = program(program.initial(), 0, 1, ENDLESS)  # all lives begin in it
    taken, rates = [], []
    for repeat in range(repeats):
        rates.append(product_rate(config.env_workers, config.lpg_gru_width))
        start = 1 + repeat * steps
        seconds, (state, _, _) = processor_seconds(program, state, start, start + steps, ENDLESS)
        taken.append(seconds / steps / members)
    seconds, rate = float(np.median(taken)), float(np.median(rates))
    rollouts = config.num_agents * (config.num_agent_updates + 1) * config.env_workers * config.train_rollout_len
    share = config.num_agents * objective_flops(config) / seconds / 1e9 / rate
    agents = members * config.num_agents
    print(
        f"{members} members of {config.num_agents} agents: {1 / seconds:.3g} meta-steps and {rollouts / seconds:,.0f} "
        f"environment steps per second of processor time; products of the objective {share:.0%} of {rate:.1f} GFLOP/s; "
        f"per agent {program.bytes_per_member[0] / config.num_agents / 1e6:.2f} MB of state, "
        f"{program.device_bytes * mesh.devices.size / agents / 1e6:.2f} MB with all that the program needs",
        flush=True,
    )


# --- rows against one-hot products ------------------------------------------------------------------------------------


class OneHot(World):
    """A world whose agents read the whole observation."""

    def observe(self, obs: jax.Array, state: Any, params: Any) -> learners.Observations:
        return obs


def plain(world: World) -> OneHot:
    """The same world with one-hot observations."""
    return OneHot(**{field.name: getattr(world, field.name) for field in dataclasses.fields(world)})


class Case(NamedTuple):
    """An agent with what it has seen and what it is told."""

    agent: learners.LivingAgent
    acting: worlds.Acting
    rollout: learners.Rollout
    pi_hat: jax.Array
    y_hat: jax.Array


def case(world: World, config: Config, weights: network.Weights, params: Any) -> Case:
    """The same agent and the same chances in any version of a world."""
    keys = jax.random.split(jax.random.key(1), 3)
    agent = population.new_agent(world, keys[0], jnp.int32(ENDLESS), config.lpg_target_width)
    acting = worlds.begin(world, params, keys[1], config.env_workers)
    given = (world, params, agent.actor.network, acting, keys[2], config.train_rollout_len)
    acting, rollout, _ = worlds.collect(*given)
    return Case(agent, acting, rollout, *network.apply(weights, learners.network_inputs(agent, rollout)))


def parts(world: World, config: Config, weights: network.Weights, params: Any) -> dict[str, Callable[[Any, Any], Any]]:
    """What is compared: `(case, number) -> case`, one after another."""
    switches = meta_gradient.Switches()

    def told(case: Case, number: jax.Array) -> Case:
        after = learners.push(world.build, config, case.agent, case.rollout, case.pi_hat, case.y_hat)[0]
        return case._replace(agent=after)

    def by_a2c(case: Case, number: jax.Array) -> Case:
        return case._replace(agent=learners.a2c_update(world.build, config, case.agent, case.rollout)[0])

    def lived(case: Case, number: jax.Array) -> Case:
        actor, key = case.agent.actor.network, jax.random.fold_in(jax.random.key(2), number)
        given = (world, params, actor, case.acting, key, config.train_rollout_len)
        acting, rollout, _ = worlds.collect(*given)
        after = meta_gradient.follow(world.build, switches, config, weights, case.agent, rollout)[0]
        return case._replace(agent=after, acting=acting)

    return {"an agent's step as told": told, "a step of A2C": by_a2c, "rollout, objective and step": lived}


def loop_of(step: Callable[[Any, Any], Any], steps: int, given: Any) -> Callable[[Any], Any]:
    """So many steps, compiled."""
    many = jax.jit(lambda given: jax.lax.fori_loop(0, steps, lambda number, carry: step(carry, number), given))
    return many.lower(given).compile()


def versions(config: Config, updates: int, steps: int) -> dict[str, dict[str, tuple[Callable[[Any], Any], Any, int]]]:
    """Compiled loops of every part with rows and with products: part, version, and `(loop, start, steps)`."""
    made: dict[str, dict[str, tuple[Callable[[Any], Any], Any, int]]] = {}
    program = config.program()
    weights = network.init(jax.random.key(0), shapes_of(config))
    params = program.world.draw(jax.random.key(3))
    for name, world in {"rows": program.world, "one-hot": plain(program.world)}.items():
        start = jax.jit(lambda weights, world=world: case(world, config, weights, params))(weights)
        for part, step in parts(world, config, weights, params).items():
            made.setdefault(part, {})[name] = loop_of(step, updates, start), start, updates
        program.world = world
        state = jax.jit(alone(lambda key: program.init(key, config)))(jax.random.key(0))
        loop = loop_of(alone(lambda state, t: program.update(state, config, t)[0]), steps, state)
        made.setdefault("a meta-step", {})[name] = loop, loop(state), steps  # all lives have begun
    return made


def measure_versions(config: Config, updates: int, steps: int, repeats: int) -> None:
    """Prints the time of every part with rows, and how much longer it takes with products."""
    for part, both in versions(config, updates, steps).items():
        taken: dict[str, list[float]] = {name: [] for name in both}
        for repeat in range(repeats + 1):  # the first one is not counted
            for name, (loop, start, count) in both.items():
                taken[name] += [processor_seconds(loop, start)[0] / count][: repeat > 0]
        rows, products = (float(np.median(taken[name])) for name in ("rows", "one-hot"))
        print(
            f"{part}: {1e3 * rows:.2f} ms, with one-hot products {1e3 * products:.2f} ms: {products / rows:.1f} times"
        )


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env_name", default="GridWorld-all-0")
    parser.add_argument("--members", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--num_agents", type=int, default=2)
    parser.add_argument("--lpg_gru_width", type=int, default=256)
    parser.add_argument("--env_workers", type=int, default=64)
    parser.add_argument("--train_rollout_len", type=int, default=20)
    parser.add_argument("--steps", type=int, default=2, help="meta-steps of one repeat")
    parser.add_argument("--updates", type=int, default=20, help="updates of an agent in one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    options = vars(parser.parse_args(words))
    members, steps, updates, repeats = (options.pop(name) for name in ("members", "steps", "updates", "repeats"))
    try:
        config = Config(num_train_steps=ENDLESS, eval_frequency=0, eval_agents=0, **options).resolved()
    except UserError as error:
        parser.error(str(error))
    print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for count in members:
        measure_members(config, count, steps, repeats)
    measure_versions(config, updates, steps, repeats)


if __name__ == "__main__":
    main()
