"""The agents that learned optimisers are compared on: one so far."""

import dataclasses

from purejax_bilevel.agents import Agent, Agents
from purejax_bilevel.programs.learned_optimizers import ppo


@dataclasses.dataclass(frozen=True)
class PolicyGradient(Agent):
    """An agent of this family; its functions have the arguments of `ppo.init` and `ppo.iteration`."""


AGENTS: Agents[PolicyGradient] = Agents(
    PolicyGradient,
    [PolicyGradient("ppo", "proximal policy optimisation", step=ppo.iteration, init=ppo.init)],
)
