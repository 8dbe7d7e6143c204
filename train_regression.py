"""Track a moving regression problem with bilevel methods: all seeds and settings in one compiled program.

./setup/run python train_regression.py --agent_type funcbo --num_seeds 10 --grad_buffer_size 1 10 100
"""

import sys

from purejax_bilevel import RegressionConfig
from purejax_bilevel.experiment.cli import main

if __name__ == "__main__":
    sys.exit(
        main(
            RegressionConfig, "Non-stationary regression; options with several values give one member per combination."
        )
    )
