"""Track a moving regression problem with bilevel methods: all seeds and settings in one compiled program.

./setup/run python train_regression.py --agent_type funcbo --num_seeds 10 --grad_buffer_size 1 10 100
"""

import sys

from purejax_bilevel.scripts import regression_configuration as configuration
from purejax_bilevel.scripts import train_regression

__all__ = ["configuration"]

if __name__ == "__main__":
    sys.exit(train_regression())
