"""Run a whole study, all agents, settings and seeds, in one compiled call, and write its report.

./setup/run python sweep.py omd_capacity --scale smoke
./setup/run python sweep.py my_sweep.yaml num_train_steps=50000 --search es
"""

import sys

from purejax_bilevel.scripts import sweep

if __name__ == "__main__":
    sys.exit(sweep())
