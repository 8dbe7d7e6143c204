"""Train bilevel model-based agents: all seeds and hyper-parameter settings in one compiled program.

./setup/run python train_rl.py --agent_type omd --num_seeds 8 --lr 1e-3 3e-4
"""

import sys

from purejax_bilevel.algorithms.model_based import Config
from purejax_bilevel.experiment.cli import main

if __name__ == "__main__":
    sys.exit(
        main(Config, "Train bilevel model-based agents; options with several values give one member per combination.")
    )
