"""Train bilevel model-based agents: all seeds and hyper-parameter settings in one compiled program.

./setup/run python train_rl.py --agent_type omd --num_seeds 8 --lr 1e-3 3e-4
./setup/run python train_rl.py --env_name Pendulum-v1 --agent_type omd --model_hidden_dim 3 64 --num_seeds 5
./setup/run python train_rl.py --env_name tabular --norm_bound 1 2 3 4 --num_seeds 10
"""

import sys

from purejax_bilevel.scripts import rl_configuration as configuration
from purejax_bilevel.scripts import train_rl

__all__ = ["configuration"]

if __name__ == "__main__":
    sys.exit(train_rl())
