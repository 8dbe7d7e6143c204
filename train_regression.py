"""Track a moving regression problem with bilevel methods: all seeds and settings in one compiled program.

./setup/run python train_regression.py --agent_type funcbo --num_seeds 10 --grad_buffer_size 1 10 100
"""

import sys

from purejax_bilevel.studies.command_line import main


def configuration() -> type:
    """The class of options; imported once all processes have joined."""
    from purejax_bilevel import RegressionConfig

    return RegressionConfig


if __name__ == "__main__":
    sys.exit(
        main(
            configuration,
            "Non-stationary regression; options with several values give one member per combination.",
        )
    )
