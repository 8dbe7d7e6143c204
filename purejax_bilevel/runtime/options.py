"""How to run, as opposed to what: each option declared once, for Python and for all command lines."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from purejax_bilevel.errors import UserError


def option(default: Any, help: str, **more: Any) -> Any:
    """Declares an option.

    Args:
        default: its value when nothing is said.
        help: one line for `--help`.
        more: further metadata.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HowToRun:
    """What Python and command lines have in common."""

    devices: int | None = option(
        None, "number of devices, of all processes together (default: all cores or accelerators)"
    )
    member_batch: int | None = option(
        None,
        "members trained at once on a device, 0: all (default: as a resumed run began; 1 on a CPU, all elsewhere)",
    )
    chunks: int | None = option(
        None, "calls of the compiled program (default: one every few seconds); changes no number"
    )
    wandb_mode: Literal["disabled", "offline", "online"] | None = option(
        None, "Weights and Biases (default: what WANDB_MODE says, else disabled)"
    )
    wandb_runs: Literal["member", "setting"] = option("member", "one wandb run per member or per setting")
    tensorboard: bool = option(False, "write TensorBoard files")
    quiet: bool = option(False, "no progress bar, no table")

    def __post_init__(self) -> None:
        if self.member_batch is not None and self.member_batch < 0:
            raise UserError(f"--member_batch must be 0 (all) or a positive number, got {self.member_batch}.")
        if self.chunks is not None and self.chunks < 1:
            raise UserError(f"--chunks must be at least 1, got {self.chunks}.")


@dataclasses.dataclass(frozen=True)
class RunOptions(HowToRun):
    """How to run, from Python.

    Args:
        folder: where to write results and checkpoints, seen by all processes; None: nowhere.
        resume: go on from the folder's checkpoint if there is one.
    """

    folder: Path | None = None
    resume: bool = False
