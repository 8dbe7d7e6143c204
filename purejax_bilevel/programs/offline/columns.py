"""Results under the names of the original's files, for the tools that read these: `progress.txt`, one per member.

The columns are those of Mr-Pepe's code (Spinning Up's logger) as far as they are measured here; it writes 0 where
nothing was measured, here it is `nan`. Without jax.
"""

import json
from pathlib import Path

import numpy as np
import xarray

from purejax_bilevel.errors import UserError
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions, setting_labels

FILE_NAME = "progress.txt"
# Column -> variable of results.nc and its sign, in the original's order. Epoch and TotalEnvInteracts are made below.
COLUMNS = {
    "AverageEpRet": ("training_return", 1.0),
    "AverageTestEpRet": ("evaluation_return", 1.0),
    "TotalEnvInteracts": (STEP, 1.0),
    "AverageLossEnvModel": ("model_loss", 1.0),
    "AverageLogPi": ("entropy", -1.0),
    "LossPi": ("policy_loss", 1.0),
    "LossQ": ("q_loss", 1.0),
}
ONLINE = "Online"  # the program whose steps are counted from 0 on; those of offline ones end at 0


def write(dataset: xarray.Dataset, folder: Path) -> list[Path]:
    """Writes a folder for each member with `progress.txt` and `config.json`.

    Args:
        dataset: of an agent of this family.
        folder: where to; members are in `<title>/<title>-s<seed>`, with the number of their setting where there are
            several.

    Returns:
        The files.

    Raises:
        UserError: the run is of another family, or the place is not writable.
    """
    if "evaluation_return" not in dataset or STEP not in dataset["evaluation_return"].dims:
        raise UserError(f"a run of {dataset.attrs.get('program', 'this program')} has no returns of evaluations.")
    labels, written = setting_labels(dataset), []
    for number, label in enumerate(labels):
        name = dataset.attrs["title"] + (f"-{number}" if len(labels) > 1 else "")
        for place, seed in enumerate(dataset[SEED].values):
            own = folder / name / f"{name}-s{seed}"
            config = {**dataset.attrs["config"], **label, "seed": int(seed), "exp_name": name}
            own.mkdir(parents=True, exist_ok=True)
            datasets.write_text(own / "config.json", json.dumps(datasets.as_plain(config), indent=1) + "\n")
            datasets.write_text(own / FILE_NAME, _text(dataset, number, place))
            written.append(own / FILE_NAME)
    return written


def _text(dataset: xarray.Dataset, setting: int, seed: int) -> str:
    """The file of a member, tabs between columns."""
    steps, count = dataset[STEP].values, dataset.sizes[STEP]
    is_online = dataset.attrs["program"] == ONLINE
    found = {"Epoch": np.arange(1, count + 1) - (0 if is_online else count)}
    for column, (variable, sign) in COLUMNS.items():
        if column == "TotalEnvInteracts":
            found[column] = steps if is_online else steps - steps[-1]
        elif variable in dataset:
            found[column] = sign * _rows(dataset, variable)[setting, seed]
    lines = ["\t".join(found), *("\t".join(f"{x:.9g}" for x in row) for row in zip(*found.values(), strict=True))]
    return "\n".join(lines) + "\n"


def _rows(dataset: xarray.Dataset, variable: str) -> np.ndarray:
    """`[settings, seeds, steps]`; NaN at all steps for what an earlier stage measured."""
    dims = (*setting_dimensions(dataset), SEED, STEP)
    shape = (-1, dataset.sizes[SEED], dataset.sizes[STEP])
    if STEP not in dataset[variable].dims:
        return np.full((len(setting_labels(dataset)), *shape[1:]), np.nan)
    return dataset[variable].transpose(*dims).values.reshape(shape)
