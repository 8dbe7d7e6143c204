"""Train bilevel model-based agents: all seeds and hyper-parameter settings in one compiled program.

./setup/run python train_rl.py --agent_type omd --num_seeds 8 --lr 1e-3 3e-4
./setup/run python train_rl.py --env_name Pendulum-v1 --agent_type omd --model_hidden_dim 3 64 --num_seeds 5
./setup/run python train_rl.py --env_name tabular --norm_bound 1 2 3 4 --num_seeds 10
"""

import sys
from collections.abc import Sequence

from purejax_bilevel.studies.command_line import main, named_environment, named_setting

DISCRETE_AGENTS = ("sql", "funcbo_reward_only")  # only RLConfig has them, and says so when the actions are continuous


def configuration(arguments: Sequence[str] | None = None) -> type:
    """The class of options, by environment and agent; imported once all processes have joined."""
    from purejax_bilevel import ContinuousConfig, RLConfig, TabularConfig, environments

    environment, agent = named_environment(arguments), named_setting("agent_type", arguments).lower()
    if environment == "tabular":
        return TabularConfig
    if agent in DISCRETE_AGENTS:
        return RLConfig
    return ContinuousConfig if agent == "sac" or environments.is_continuous(environment) else RLConfig


if __name__ == "__main__":
    sys.exit(
        main(
            configuration,
            "Train bilevel model-based agents; options with several values give one member per combination. "
            "Finite MDPs and continuous actions have options of their own: --env_name tabular --help, "
            "--env_name Pendulum-v1 --help.",
        )
    )
