"""Speed of the training program on this machine, beside its own matrix-product rate.

    ./setup/run python tests/benchmarks/speed.py                       # omd with 1, 8 and 64 members
    ./setup/run python tests/benchmarks/speed.py --agent_type mle --members 8
    ./setup/run python tests/benchmarks/speed.py --env_name Pendulum-v1 --learning_only --steps 300
    ./setup/run python tests/benchmarks/speed.py --baseline script.py  # also run script.py MEMBERS_PER_CORE STEPS AGENT

Prints environment steps per second (evaluation off), the time to compile with an empty and a filled cache, MFLOP per
step, the share of the rate at which the same devices multiply matrices of a layer's shape (256x32 by 32x32 for
CartPole's networks) in the same run, the memory of a member's state, and the share of a run that evaluation takes in
the worst case (all episodes last to the time limit; not with --learning_only), if that is more than equal runs
differ by.
"""

import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from purejax_bilevel import ContinuousConfig, RLConfig, environments, replay  # first: this lets jax use all cores
from purejax_bilevel.runtime import devices, loop
from purejax_bilevel.runtime.compiled import CompiledProgram
from purejax_bilevel.studies import run as runs

ENDLESS = 10**9
Settings = RLConfig | ContinuousConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    env_name: str = "CartPole-v1"
    agent_type: str = "omd"
    members: tuple[int, ...] = (1, 8, 64)
    steps: int = 3000  # of each member, the first 1000 of which (init_steps) only collect data
    learning_only: bool = False  # leave those out and measure `steps` more
    repeats: int = 3
    baseline: str = ""  # a script to run for comparison, between the repetitions
    compile_only: bool = False  # used by the script itself, in fresh processes


def settings(arguments: Arguments, eval_frequency: int = 0) -> Settings:
    """A run without end with default sizes."""
    kind = ContinuousConfig if environments.is_continuous(arguments.env_name) else RLConfig
    default = kind(agent_type=arguments.agent_type, env_name=arguments.env_name).resolved()
    return dataclasses.replace(default, num_train_steps=ENDLESS, eval_frequency=eval_frequency)


def compiled(
    arguments: Arguments, members: int, eval_frequency: int = 0, held_up: bool = False, member_batch: int | None = None
) -> CompiledProgram:
    """The program of a run without end.

    Args:
        arguments: what to measure.
        members: how many.
        eval_frequency: steps between evaluations, 0 for none.
        held_up: CartPole's pole never falls, episodes last to their time limit.
        member_batch: members trained at once on a device; None: what a run does by itself.
    """
    part = runs.make_part(settings(arguments, eval_frequency), members, 0)
    if held_up and arguments.env_name == "CartPole-v1":
        task = part.program.task
        params = task.params.replace(theta_threshold_radians=1e9, x_threshold=1e9)
        part.program.task = dataclasses.replace(task, params=params)
    mesh = devices.make_mesh(members)
    block_steps = None if mesh.devices.flat[0].platform == "cpu" else loop.BLOCK_STEPS  # as a run does
    program = CompiledProgram([part], mesh, member_batch or devices.default_member_batch(mesh), block_steps)
    program.compile()
    return program


def seconds_per_run(program: CompiledProgram, steps: int, start: int = 0) -> float:
    """Time of `steps` steps from step `start` on."""
    # Before the clock starts: whatever happens only once, and the steps to `start`.
    state, _, _ = program(program.initial(), 0, start or 10, ENDLESS)
    state = jax.block_until_ready(state if start else program.initial())
    begin = time.perf_counter()
    program(state, start, start + steps, ENDLESS)
    return time.perf_counter() - begin


def matmul_rate(batch: int, width: int, repeats: int = 5) -> float:
    """GFLOP/s of chained products of a `batch x width` matrix with a square one, one chain on every device at once."""
    products = int(1e10) // (2 * batch * width**2)
    mesh = devices.make_mesh(len(jax.devices()))
    sharding = NamedSharding(mesh, P(devices.AXIS))
    count = mesh.devices.size
    x = jax.device_put(np.random.default_rng(0).normal(size=(count, batch, width)).astype(np.float32), sharding)
    w = jax.device_put(np.tile(np.eye(width, dtype=np.float32), (count, 1, 1)), sharding)

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: x @ w[0], x[0])[None]

    spec = P(devices.AXIS)
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False))
    run(x, w).block_until_ready()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(x, w).block_until_ready()
        times.append(time.perf_counter() - begin)
    return count * products * 2 * batch * width**2 / float(np.median(times)) / 1e9


def flops_per_step(config: Settings) -> float:
    """Floating-point operations of one outer step of one member, as XLA counts them after optimisation.

    XLA counts the body of the inner loop once; the further inner steps are added as the matrix products of the trace.
    """
    sizes = {"max_hidden_dim": config.hidden_dim, "max_model_hidden_dim": config.model_hidden_dim}
    config = dataclasses.replace(config, **sizes, max_smoothing_window=1)
    with jax.default_matmul_precision("highest"):
        one, two = (outer_step(dataclasses.replace(config, num_Q_steps=count)) for count in (1, 2))
        counted = one.lower().compile().cost_analysis()["flops"]
    inner_step = product_flops(two.jaxpr.jaxpr) - product_flops(one.jaxpr.jaxpr)
    return counted + (config.num_Q_steps - 1) * inner_step


def outer_step(config: Settings) -> Any:
    """The traced outer step of one member."""
    config = jax.tree.map(jnp.asarray, config)
    program = config.program()
    task, size = program.task, config.batch_size
    is_continuous = isinstance(task, environments.Continuous)
    obs = jnp.zeros((task.obs_dim, size))
    action = jnp.zeros((task.action_dim if is_continuous else task.num_actions, size))
    numbers = jnp.zeros(size)
    batch = replay.Batch(obs, action, numbers, obs, numbers, action if is_continuous else None)
    key = jax.random.key(0)

    def step(learner: Any, batch: replay.Batch) -> tuple:
        return program.agent.step(config, learner, lambda _: batch, key, jnp.int32(0))

    return jax.jit(step).trace(program.init(key, config).learner, batch)


def product_flops(jaxpr: Any) -> float:
    """Operations of all matrix products of a traced function, loops of known length included."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        inner = sum(product_flops(part) for part in jax.extend.core.jaxprs_in_params(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def compile_times(arguments: Arguments) -> tuple[float, float]:
    """Seconds to trace and compile in a fresh process: with an empty cache, then with the cache that left behind."""
    command = [sys.executable, __file__, "--agent_type", arguments.agent_type, "--env_name", arguments.env_name]
    command += ["--members", "8", "--compile_only"]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        outputs = [
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            for _ in range(2)
        ]
    cold, cached = (float(output.split()[-1]) for output in outputs)
    return cold, cached


def run_baseline(arguments: Arguments, members: int) -> float:
    """Environment steps/s that the last line of the baseline script says."""
    per_core = members // len(jax.devices())
    command = [sys.executable, arguments.baseline, str(per_core), str(arguments.steps), arguments.agent_type]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # it sets its own
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(re.findall(r"(\d+) environment steps/s", output)[-1])


def evaluation_seconds(arguments: Arguments) -> tuple[list[float], list[float]]:
    """Times of runs with default settings in which no episode ends early: with evaluation, and without.

    They take turns, so that other work on the machine slows both.
    """
    members = len(jax.devices())
    with_evaluation = compiled(arguments, members, eval_frequency=1000, held_up=True)
    without = compiled(arguments, members, held_up=True)
    times = [
        [seconds_per_run(program, 3 * arguments.steps) for program in (with_evaluation, without)]
        for _ in range(arguments.repeats)
    ]
    long, short = (list(column) for column in zip(*times, strict=True))
    return long, short


def share_in_words(long: Sequence[float], short: Sequence[float]) -> str:
    """What share of a run evaluation takes, or that this cannot be told.

    Args:
        long: seconds of runs with evaluation.
        short: seconds of runs without.
    """
    difference = min(long) - min(short)
    if len(long) < 2:
        return "evaluation: cannot be told from one run of each; take --repeats 3"
    noise = max(max(times) - min(times) for times in (long, short))
    if difference <= noise:
        return (
            f"evaluation: cannot be told, equal runs differ by {noise / min(long):.1%} and those with evaluation by "
            f"{difference / min(long):+.1%}: try again on an idle machine, or with more --steps"
        )
    return f"evaluation: at most {difference / min(long):.1%} of a run (equal runs differ by {noise / min(long):.1%})"


def main(arguments: Arguments) -> None:
    """Prints the table."""
    if arguments.compile_only:
        print(compiled(arguments, arguments.members[0]).compile_seconds)
        return
    print(f"{arguments.agent_type} on {len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    cold, cached = compile_times(arguments)
    print(f"compile: {cold:.1f} s cold, {cached:.1f} s with a filled cache (tracing included)")
    config = settings(arguments)
    flops = flops_per_step(config)
    print(f"arithmetic: {flops / 1e6:.1f} MFLOP per step")
    start = config.init_steps if arguments.learning_only else 0
    learning = 1.0 if arguments.learning_only else 1 - config.init_steps / arguments.steps
    for members in arguments.members:
        program = compiled(arguments, members)
        rates, rivals, products = [], [], []
        for _ in range(arguments.repeats):
            products.append(matmul_rate(config.batch_size, config.hidden_dim))
            rates.append(members * arguments.steps / seconds_per_run(program, arguments.steps, start))
            if arguments.baseline and members >= len(jax.devices()):  # it runs at least one on each
                rivals.append(run_baseline(arguments, members))
        rate, product = float(np.median(rates)), float(np.median(products))
        share = rate * learning * flops / 1e9 / product
        text = f"{members} members: {rate:,.0f} environment steps/s, {share:.0%} of all cores' {product:.0f} GFLOP/s, "
        text += f"{program.bytes_per_member[0] / 1e6:.2f} MB per member"
        if rivals:
            ratio = np.median(np.array(rates) / np.array(rivals))
            text += f"; baseline {np.median(rivals):,.0f} steps/s, ratio {ratio:.2f}"
        print(text, flush=True)
    if not arguments.learning_only:
        print(share_in_words(*evaluation_seconds(arguments)))


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,)))
