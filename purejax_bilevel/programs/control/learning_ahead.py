"""What agents of control would learn next, as functions of their settings: for settings that are adapted (`--adapt`).

The validation loss is the outer loss of the bilevel agents, for all agents: the Q-function's Bellman error on a fresh
real batch, with the target network (and the policy) that are there before the updates, discount and temperature being
the first ones. It is thus a fixed function of the Q-function that the updates lead to.
"""

from typing import Any

import jax

from purejax_bilevel.agents import Agent
from purejax_bilevel.configuration import replace
from purejax_bilevel.programs.adaptation import Lookahead
from purejax_bilevel.programs.control.agents import Draw, Step
from purejax_bilevel.programs.control.learners import Learner

FRESH_ADAM = "the only step of a fresh Adam is as long as its rate, whatever it does to the gradient"
EPS_ROOT = 1e-16  # bounds the derivative of Adam's step where a gradient is 0, as those of dead units are


def lookahead(step: Step, learner: Learner, draw: Draw, config: Any, first: jax.Array, key: jax.Array) -> Lookahead:
    """The next updates and their validation loss.

    Args:
        step: the agent's.
        learner: as it is before them.
        draw: gives a batch of real transitions.
        config: with the first values of the settings.
        first: number of the first of them.
        key: consumed.
    """
    updates_key, loss_key = jax.random.split(key)
    batch = draw(loss_key)

    def update(own: Any, learner: Learner, number: jax.Array) -> Learner:
        own = replace(own, eps_root=EPS_ROOT)
        return step(own, learner, draw, jax.random.fold_in(updates_key, number), first + number)[0]

    return Lookahead(learner, update, lambda ahead: learner.q_loss(config, ahead.q, batch))


def why_not(config: Any, agent: Agent) -> dict[str, str]:
    """Settings that the validation loss does not depend on with this configuration, and the reason."""
    reasons: dict[str, str] = {}
    if "warm_opt" in agent.settings and not config.warm_opt and config.num_Q_steps == 1:
        of_gradient = [name for name in agent.adaptable if name != "inner_lr"]
        reasons |= dict.fromkeys(of_gradient, f"{FRESH_ADAM} ({agent.name}); give --warm_opt or --num_Q_steps 2")
    if getattr(config, "hard", False):
        reasons["alpha"] = "with --hard there is no temperature"
    if config.smoothing == "none":
        reasons["beta"] = "without --smoothing there is no share of the newest hypergradient"
    return reasons
