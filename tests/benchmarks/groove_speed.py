"""Cost of choosing levels: a meta-step of GROOVE over one of LPG, in processor time, in one process.

    python tests/benchmarks/groove_speed.py --num_agents 2 --lifetime 50 --repeats 3

Both learn with the same agents, lives and widths. Processor time of all threads is counted, so that other work on the
machine does not matter. Short lives make the ends of lives, where GROOVE measures returns, more frequent than the
default's 250 updates.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax

from purejax_bilevel.program import alone
from purejax_bilevel.programs.meta_objectives.program import Config


def loop_of(config: Config, steps: int) -> tuple[Callable[[Any, Any], Any], Any]:
    """A compiled loop of meta-steps, and a state to start from."""
    config = config.resolved()
    program = config.program()

    def many(state: Any, start: jax.Array) -> Any:
        return jax.lax.fori_loop(start, start + steps, lambda t, state: program.update(state, config, t)[0], state)

    state = jax.jit(alone(lambda key: program.init(key, config)))(jax.random.key(0))
    return jax.jit(alone(many)).lower(state, 0).compile(), state


def seconds(function: Callable[[Any, Any], Any], state: Any, start: int) -> tuple[float, Any]:
    """Processor time of one call, and what it gives."""
    before = time.process_time()
    state = jax.block_until_ready(function(state, start))
    return time.process_time() - before, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env_name", default="GridWorld-all_shortlife")
    parser.add_argument("--num_agents", type=int, default=2)
    parser.add_argument("--lifetime", type=int, default=50)
    parser.add_argument("--lpg_gru_width", type=int, default=256)
    parser.add_argument("--env_workers", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="meta-steps of one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    options = vars(parser.parse_args())
    steps, repeats = options.pop("steps"), options.pop("repeats")
    common = options | {"eval_agents": 0}
    configs = {"lpg": Config(**common), "groove": Config(agent_type="groove", buffer_size=64, **common)}
    loops = {name: loop_of(config, steps) for name, config in configs.items()}
    found: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(repeats + 1):  # the first one is not counted: all lives begin in it
        for name, (function, state) in loops.items():
            taken, state = seconds(function, state, repeat * steps)
            loops[name] = function, state
            found[name] += [taken / steps] if repeat else []
            print(f"{name}: {taken / steps:.3f} s of processor time per meta-step", flush=True)
    ratio = sum(found["groove"]) / sum(found["lpg"])
    print(f"GROOVE / LPG per meta-step: {ratio:.3f}")


if __name__ == "__main__":
    main()
