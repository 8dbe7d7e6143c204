"""Checks of the settings of agents in the environment (`online`), and what follows from several of them."""

import math

from purejax_bilevel.configuration import values_of
from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import ensemble_program, refitting, termination
from purejax_bilevel.programs.offline.agents import OfflineAgent
from purejax_bilevel.programs.offline.settings import Online

LARGEST_CAPACITY = 1_000_000  # real transitions kept unless told otherwise
LARGEST_COUNT = 2**31 - 1  # steps are counted in 32 bits


def given_rows(config: Online) -> int:
    """Rows of the dataset that the real buffer begins with: whole steps of all copies."""
    if not config.dataset:
        return 0
    rows = len(ensemble_program.dataset_of(config))
    return rows - rows % config.num_envs


def capacity_of(config: Online) -> int:
    """Rows of the real buffer, a multiple of what its layout needs."""
    everything = given_rows(config) + config.num_train_steps * config.num_envs
    capacity = config.real_capacity or max(min(everything, LARGEST_CAPACITY), given_rows(config))
    unit = math.lcm(config.num_envs, refitting.period(config))
    return -(-capacity // unit) * unit


def check_together(config: Online, agent: OfflineAgent) -> None:
    """Refuses settings that do not go together.

    Args:
        config: with its capacity.
        agent: of it.

    Raises:
        UserError: naming them.
    """
    given = given_rows(config)
    period = refitting.period(config)
    if agent.has_model:
        steps, name = (config.model_every, "model_every") if config.model else (config.init_steps, "init_steps")
        rows = given + steps * config.num_envs
        if rows < 2 * period:
            raise UserError(
                f"--{name} {steps} with {config.num_envs} environments leaves {rows} transitions for the first fit of "
                f"the ensemble, which needs {2 * period}."
            )
    if config.real_capacity < given:
        raise UserError(f"--real_capacity {config.real_capacity} is smaller than the dataset, which has {given} rows.")
    for name in ("model", "last_rollout_length"):
        if not agent.has_model and values_of(getattr(config, name)) not in (("",), (0,)):
            raise UserError(f"--{name} {getattr(config, name)} is for --agent_type mbpo, not {config.agent_type}.")
    per_step = max(config.num_envs, config.updates_per_step)
    if config.num_train_steps * per_step + given > LARGEST_COUNT:
        raise UserError(
            f"--num_train_steps {config.num_train_steps} with {config.num_envs} environments and "
            f"{config.updates_per_step} updates per step is more than can be counted ({LARGEST_COUNT})."
        )


def terminals_of(config: Online) -> termination.Termination | None:
    """The rule that ends imagined episodes; None where the ensemble learns it.

    Raises:
        UserError: a rule is asked for and not known.
    """
    rule, asked = termination.of(config.env_name), config.model_terminals
    if asked == "rule" and rule is None:
        raise UserError(f"--model_terminals rule: when episodes of {config.env_name} end is not known.")
    if asked == "learned" or (asked == "auto" and rule is None):
        return None
    return termination.never if asked == "never" or rule is None else rule
