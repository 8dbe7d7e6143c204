"""The three commands, for the scripts beside the package and for those that an installation makes.

What takes time to import is imported inside the functions: an interrupt meanwhile ends the script with one line, and
`--help` needs little of it.
"""

import typing
from collections.abc import Sequence

from purejax_bilevel import interrupts


def rl_configuration(arguments: Sequence[str] | None = None) -> type:
    """The class of options of `train_rl`, by environment and agent; imported once all processes have joined.

    The actions decide, unless the agent is one of the other kind only: that kind's class then says what is wrong. A
    class is imported only when it may be the one: policies for continuous actions take as long to import as jax.
    """
    import purejax_bilevel
    from purejax_bilevel.studies import command_line

    environment = command_line.named_environment(arguments)
    agent = command_line.named_setting("agent_type", arguments).lower()
    if environment == "tabular":
        return purejax_bilevel.TabularConfig
    discrete = purejax_bilevel.RLConfig

    from purejax_bilevel import environments

    is_continuous = environments.is_continuous(environment)
    if not is_continuous and (not agent or agent in agents_of(discrete)):
        return discrete
    continuous = purejax_bilevel.ContinuousConfig
    if is_continuous:
        return discrete if agent in agents_of(discrete) - agents_of(continuous) else continuous
    return continuous if agent in agents_of(continuous) else discrete


def agents_of(config_class: type) -> set[str]:
    """The names that a class of options accepts as `agent_type`."""
    return set(typing.get_args(typing.get_type_hints(config_class)["agent_type"]))


def regression_configuration() -> type:
    """The class of options of `train_regression`; imported once all processes have joined."""
    from purejax_bilevel import RegressionConfig

    return RegressionConfig


def train_rl() -> int:
    """Trains bilevel model-based agents; returns the exit status."""
    interrupts.end_at_once()
    from purejax_bilevel.studies import command_line

    return command_line.main(
        rl_configuration,
        "Train bilevel model-based agents; options with several values give one member per combination. "
        "Finite MDPs and continuous actions have options of their own: --env_name tabular --help, "
        "--env_name Pendulum-v1 --help.",
    )


def train_regression() -> int:
    """Tracks a moving regression problem; returns the exit status."""
    interrupts.end_at_once()
    from purejax_bilevel.studies import command_line

    return command_line.main(
        regression_configuration,
        "Non-stationary regression; options with several values give one member per combination.",
    )


def sweep() -> int:
    """Runs a whole study; returns the exit status."""
    interrupts.end_at_once()
    from purejax_bilevel.studies import sweep_command

    return sweep_command.main()
