"""The three commands, for the scripts beside the package and for those that an installation makes.

What takes time to import is imported inside the functions: an interrupt meanwhile ends the script with one line, and
`--help` needs little of it.
"""

from collections.abc import Iterator, Sequence

from purejax_bilevel import garbage, interrupts


def rl_configuration(arguments: Sequence[str] | None = None) -> type:
    """The class of options of `train_rl`, by environment and agent; imported once all processes have joined.

    The actions decide, unless the agent is one of the other kind only: that kind's class then says what is wrong. A
    class is imported only when it may be the one: policies for continuous actions take as long to import as jax.
    """
    import purejax_bilevel
    from purejax_bilevel import agents
    from purejax_bilevel.studies import command_line

    environment = command_line.named_environment(arguments)
    agent = agents.spelled(command_line.named_setting(agents.FIELD, arguments))
    if environment == "tabular":
        return purejax_bilevel.TabularConfig
    discrete = purejax_bilevel.RLConfig

    from purejax_bilevel import environments

    is_continuous = environments.is_continuous(environment)
    if not is_continuous and (not agent or has_agent(discrete, agent)):
        return discrete
    continuous = purejax_bilevel.ContinuousConfig
    first, *others = (continuous, discrete) if is_continuous else (discrete, continuous)
    if not agent or has_agent(first, agent):
        return first
    return next((family for family in [*others, *_further_families()] if has_agent(family, agent)), first)


def _further_families() -> Iterator[type]:
    """Configurations of the families that are told by the agent alone, whatever the environment.

    The observatories, which train agents of other families, are for sweeps and Python.
    """
    import importlib

    from purejax_bilevel.programs import REGISTRY

    for name, module in REGISTRY.items():
        if name not in ("rl", "continuous", "regression", "tabular") and not name.startswith("observatory"):
            yield importlib.import_module(module).Config


def has_agent(config_class: type, name: str) -> bool:
    """Whether a class of options accepts a name as `agent_type`."""
    from purejax_bilevel import agents

    known = agents.registry(config_class)
    return known is not None and name in known


def regression_configuration() -> type:
    """The class of options of `train_regression`; imported once all processes have joined."""
    from purejax_bilevel import RegressionConfig

    return RegressionConfig


def train_rl() -> int:
    """Trains bilevel model-based agents; returns the exit status."""
    interrupts.end_at_once()
    garbage.put_off()
    from purejax_bilevel.studies import command_line

    return command_line.main(
        rl_configuration,
        "Train bilevel model-based agents; options with several values give one member per combination. "
        "Finite MDPs, continuous actions and other agents have options of their own: --env_name tabular --help, "
        "--env_name Pendulum-v1 --help, --agent_type ppo --help.",
    )


def train_regression() -> int:
    """Tracks a moving regression problem; returns the exit status."""
    interrupts.end_at_once()
    garbage.put_off()
    from purejax_bilevel.studies import command_line

    return command_line.main(
        regression_configuration,
        "Non-stationary regression; options with several values give one member per combination.",
    )


def sweep() -> int:
    """Runs a whole study; returns the exit status."""
    interrupts.end_at_once()
    garbage.put_off()
    from purejax_bilevel.studies import sweep_command

    return sweep_command.main()
