"""Speed of the training program on this machine, beside its own matrix-product rate.

    ./setup/run python tests/benchmarks/speed.py                       # omd with 1, 8 and 64 members
    ./setup/run python tests/benchmarks/speed.py --agent_type mle --members 8
    ./setup/run python tests/benchmarks/speed.py --baseline script.py  # also run script.py MEMBERS_PER_CORE STEPS AGENT

Prints environment steps per second (evaluation off), the time to compile with an empty and a filled cache, MFLOP per
step, the share of the rate at which the same devices multiply 256x32 by 32x32 matrices in the same run, the memory of
a member's state, and the share of a run that evaluation takes in the worst case (all episodes last to the time limit).
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from purejax_bilevel import RLConfig, replay  # RLConfig first: it lets jax use all cores
from purejax_bilevel.algorithms import agents
from purejax_bilevel.algorithms.model_based import AgentType, ModelBased
from purejax_bilevel.experiment import devices, experiment
from purejax_bilevel.experiment.program import CompiledProgram

ENDLESS = 10**9
INIT_STEPS = RLConfig().init_steps


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    agent_type: AgentType = "omd"
    members: tuple[int, ...] = (1, 8, 64)
    steps: int = 3000  # of each member, the first 1000 of which only collect data
    repeats: int = 3
    baseline: str = ""  # a script to run for comparison, between the repetitions
    compile_only: bool = False  # used by the script itself, in fresh processes


def compiled(arguments: Arguments, members: int, eval_frequency: int = 0, held_up: bool = False) -> CompiledProgram:
    """The program of a run without end; `held_up`: the pole never falls, every episode lasts to its time limit."""
    agent_type = arguments.agent_type
    config = RLConfig(agent_type=agent_type, num_train_steps=ENDLESS, eval_frequency=eval_frequency)
    part = experiment.make_part(config.resolved(), members, 0)
    if held_up:
        task = part.program.task
        params = task.params.replace(theta_threshold_radians=1e9, x_threshold=1e9)
        part.program.task = dataclasses.replace(task, params=params)
    mesh = devices.make_mesh(members)
    program = CompiledProgram([part], mesh, devices.default_member_batch(mesh))
    program.compile()
    return program


def seconds_per_run(program: CompiledProgram, steps: int) -> float:
    """Time of the first `steps` steps, of which the first 1000 only collect data."""
    program(program.initial(), 0, 10, ENDLESS)  # whatever happens only once
    state = jax.block_until_ready(program.initial())
    begin = time.perf_counter()
    program(state, 0, steps, ENDLESS)
    return time.perf_counter() - begin


def matmul_rate(repeats: int = 5, products: int = 20_000) -> float:
    """GFLOP/s of chained 256x32 by 32x32 products, one chain on every device at once."""
    mesh = devices.make_mesh(len(jax.devices()))
    sharding = NamedSharding(mesh, P(devices.AXIS))
    count = mesh.devices.size
    x = jax.device_put(np.random.default_rng(0).normal(size=(count, 256, 32)).astype(np.float32), sharding)
    w = jax.device_put(np.tile(np.eye(32, dtype=np.float32), (count, 1, 1)), sharding)

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
    return count * products * 2 * 256 * 32 * 32 / float(np.median(times)) / 1e9


def flops_per_step(agent_type: AgentType) -> float:
    """Floating-point operations of one outer step, as XLA counts them after optimisation."""
    config = RLConfig(agent_type=agent_type, max_hidden_dim=32, max_model_hidden_dim=32, max_smoothing_window=1)
    config = jax.tree.map(jnp.asarray, config.resolved())
    program = ModelBased(config)
    learner = program.init(jax.random.key(0), config).learner
    batch = replay.Batch(*(jnp.zeros(shape) for shape in ((4, 256), (2, 256), (256,), (4, 256), (256,))))

    def step(learner: agents.Learner, batch: replay.Batch) -> tuple:
        return program.agent(config, learner, lambda _: batch, jax.random.key(0), jnp.int32(0))

    with jax.default_matmul_precision("highest"):
        return jax.jit(step).lower(learner, batch).compile().cost_analysis()["flops"]


def compile_times(arguments: Arguments) -> tuple[float, float]:
    """Seconds to trace and compile in a fresh process: with an empty cache, then with the cache that left behind."""
    command = [sys.executable, __file__, "--agent_type", arguments.agent_type, "--members", "8", "--compile_only"]
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
    per_core = max(1, members // len(jax.devices()))
    command = [sys.executable, arguments.baseline, str(per_core), str(arguments.steps), arguments.agent_type]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # it sets its own
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(re.findall(r"(\d+) environment steps/s", output)[-1])


def evaluation_share(arguments: Arguments) -> float:
    """Share of the time of a run with default settings that evaluation takes when no episode ends early."""
    members = len(jax.devices())
    with_evaluation = compiled(arguments, members, eval_frequency=1000, held_up=True)
    without = compiled(arguments, members, held_up=True)
    long, short = (
        min(seconds_per_run(program, 3 * arguments.steps) for _ in range(arguments.repeats))
        for program in (with_evaluation, without)
    )
    return (long - short) / long


def main(arguments: Arguments) -> None:
    """Prints the table."""
    if arguments.compile_only:
        print(compiled(arguments, arguments.members[0]).compile_seconds)
        return
    print(f"{arguments.agent_type} on {len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    cold, cached = compile_times(arguments)
    print(f"compile: {cold:.1f} s cold, {cached:.1f} s with a filled cache (tracing included)")
    flops = flops_per_step(arguments.agent_type)
    print(f"arithmetic: {flops / 1e6:.1f} MFLOP per step")
    for members in arguments.members:
        program = compiled(arguments, members)
        rates, rivals, products = [], [], []
        for _ in range(arguments.repeats):
            products.append(matmul_rate())
            rates.append(members * arguments.steps / seconds_per_run(program, arguments.steps))
            if arguments.baseline:
                rivals.append(run_baseline(arguments, members))
        rate, product = float(np.median(rates)), float(np.median(products))
        devices_used = min(members, len(jax.devices()))
        learning = 1 - INIT_STEPS / arguments.steps
        share = rate * learning * flops / 1e9 / (product * devices_used / len(jax.devices()))
        text = f"{members} members: {rate:,.0f} environment steps/s, {share:.0%} of {product:.0f} GFLOP/s, "
        text += f"{program.bytes_per_member[0] / 1e6:.2f} MB per member"
        if rivals:
            ratio = np.median(np.array(rates) / np.array(rivals))
            text += f"; baseline {np.median(rivals):,.0f} steps/s, ratio {ratio:.2f}"
        print(text, flush=True)
    print(f"evaluation: at most {evaluation_share(arguments):.1%} of a run")


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,)))
