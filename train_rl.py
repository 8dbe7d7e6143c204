"""Train bilevel model-based agents: all seeds and hyper-parameter settings in one compiled program.

./setup/run python train_rl.py --agent_type omd --num_seeds 8 --lr 1e-3 3e-4
./setup/run python train_rl.py --env_name tabular --norm_bound 1 2 3 4 --num_seeds 10
"""

import sys

from purejax_bilevel import RLConfig, TabularConfig
from purejax_bilevel.experiment.cli import main, named_environment

CONFIGURATIONS = {"tabular": TabularConfig}  # by environment; all others are RLConfig's

if __name__ == "__main__":
    sys.exit(
        main(
            CONFIGURATIONS.get(named_environment(), RLConfig),
            "Train bilevel model-based agents; options with several values give one member per combination. "
            "Finite MDPs have options of their own: --env_name tabular --help.",
        )
    )
