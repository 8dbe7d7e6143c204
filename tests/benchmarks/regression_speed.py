"""How fast non-stationary regression runs, beside its arithmetic and what this machine multiplies in the same minute.

    python tests/benchmarks/regression_speed.py [--agent_type funcbo] [--members 2] [--steps 500]

One member per core at the original defaults. Printed: steps per second of all members by the clock and by the
process's own CPU time (which other programs on the machine disturb less), the compile time, the matrix products of a
step in MFLOP, and their rate as a share of a 1024 x 1024 product's on one core.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from purejax_bilevel.programs.regression import agents as regression_agents
from purejax_bilevel.programs.regression.program import Config
from purejax_bilevel.runtime import devices
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.studies import run as runs

PRODUCT = 1024


def main() -> None:
    devices.prepare()
    parser = argparse.ArgumentParser()
    parser.add_argument("--agent_type", default="funcbo", choices=["funcbo", "funcbo_nosmooth"])
    parser.add_argument("--members", type=int, default=jax.device_count())
    parser.add_argument("--steps", type=int, default=500, help="between two looks at the clock")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    for regret_frequency in (10, 0):
        config = Config(agent_type=options.agent_type, regret_frequency=regret_frequency).resolved()
        measure(config, options.members, options.steps, options.repeats)


def measure(config: Config, members: int, steps: int, repeats: int) -> None:
    part = runs.make_part(config, members, 0)
    mesh = devices.make_mesh(members)
    program = CompiledProgram([part], mesh, devices.default_member_batch(mesh))
    program.compile()
    state, start, total = program.initial(), 0, 10**9
    clock, process, product = [], [], []
    for _ in range(repeats + 1):
        product.append(product_rate())
        begin, begin_process = time.perf_counter(), time.process_time()
        state, _, _ = program(state, start, start + steps, total)
        clock.append(members * steps / (time.perf_counter() - begin))
        process.append(members * steps / (time.process_time() - begin_process))
        start += steps
    flops = step_flops(config)
    by_clock, by_process = (float(np.median(values[1:])) for values in (clock, process))
    rate, best = flops * by_process, float(np.median(product[1:]))
    print(
        f"{config.agent_type}, regret every {config.regret_frequency or 'no'} steps, {members} members on "
        f"{mesh.devices.size} devices: {by_clock:.0f} steps/s by the clock, {by_process:.0f} per second of CPU time "
        f"(x {mesh.devices.size} devices = {by_process * mesh.devices.size:.0f})\n"
        f"    compiled in {program.compile_seconds:.1f} s; {flops / 1e6:.1f} MFLOP a step; {rate / 1e9:.1f} GFLOP/s "
        f"per core, {100 * rate / best:.0f} % of the {best / 1e9:.0f} GFLOP/s of a {PRODUCT} x {PRODUCT} product"
    )


def step_flops(config: Config) -> float:
    """Matrix products of one time step of funcbo."""
    sizes = (config.input_dim, *[config.hidden_dim] * regression_agents.NUM_LAYERS, config.output_dim)
    products = [2.0 * a * b * config.batch_size for a, b in itertools.pairwise(sizes)]
    forward = sum(products)
    training = 3 * forward - products[0]  # no gradient for the inputs
    solves = 1.0
    if config.regret_frequency:
        solves += (config.regret_grid_size - 1) / config.regret_frequency  # the value 0 takes no products
    dual = config.num_dual_steps * 2 * training + forward
    return solves * config.num_inner_steps * training + 2 * forward + dual


def product_rate() -> float:
    """Floating point operations per second of CPU time of one large product on one device."""
    x = jnp.ones((PRODUCT, PRODUCT))
    product = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, y: x @ y, x))
    jax.block_until_ready(product(x))
    begin = time.process_time()
    jax.block_until_ready(product(x))
    return 5 * 2.0 * PRODUCT**3 / (time.process_time() - begin)


if __name__ == "__main__":
    main()
