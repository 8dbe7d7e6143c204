"""Train bilevel model-based agents: all seeds and hyper-parameter settings in one compiled program.

./setup/run python train_rl.py --agent_type omd --num_seeds 8 --lr 1e-3 3e-4
./setup/run python train_rl.py --env_name tabular --norm_bound 1 2 3 4 --num_seeds 10
"""

import sys

from purejax_bilevel.algorithms import model_based, tabular
from purejax_bilevel.experiment.cli import main, named_environment

CONFIGURATIONS = {"tabular": tabular.Config}  # by environment; all others are model_based's

if __name__ == "__main__":
    sys.exit(
        main(
            CONFIGURATIONS.get(named_environment(), model_based.Config),
            "Train bilevel model-based agents; options with several values give one member per combination. "
            "Finite MDPs have options of their own: --env_name tabular --help.",
        )
    )
