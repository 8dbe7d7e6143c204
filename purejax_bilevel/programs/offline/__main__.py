"""What is made of finished runs of offline agents: the bandit protocol, and the original's result columns.

python -m purejax_bilevel.programs.offline bandit runs/mopo runs/morel
python -m purejax_bilevel.programs.offline columns runs/mopo
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import xarray
from rich.console import Console
from rich.table import Table

from purejax_bilevel.errors import UserError
from purejax_bilevel.programs.offline import columns, protocol
from purejax_bilevel.results import dataset as datasets

SHOWN = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # episodes at which a table has a column


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m purejax_bilevel.programs.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=["bandit", "columns"])
    parser.add_argument("folders", nargs="+", type=Path, help="of runs, or of sweeps, whose agents are runs")
    parser.add_argument("--episodes", type=int, default=200, help="bandit: that may be spent (default: 200)")
    parser.add_argument("--policies", type=int, default=20, help="bandit: at hand in each repeat (default: 20)")
    parser.add_argument("--repeats", type=int, default=1000, help="bandit: of the whole (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="bandit: of its draws (default: 0)")
    parser.add_argument(
        "--output", type=Path, help="bandit: figure (default: bandit.png beside the first run); columns: folder"
    )
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Does what the command line says; returns the exit status: 0 done, 2 bad input."""
    asked = read_arguments(words)
    try:
        runs = runs_of(asked.folders)
        if asked.action == "bandit":
            print(_play(asked, runs))
        else:
            for place, dataset in runs.items():
                for path in columns.write(dataset, asked.output or place):
                    print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def runs_of(folders: Sequence[Path]) -> dict[Path, xarray.Dataset]:
    """The results of runs, and of the agents of sweeps, by their folders.

    Raises:
        UserError: a folder holds none.
    """
    found: dict[Path, xarray.Dataset] = {}
    for folder in folders:
        own = (
            [folder]
            if (folder / datasets.FILE_NAME).is_file()
            else sorted(path.parent for path in folder.glob(f"*/{datasets.FILE_NAME}"))
        )
        found |= {place: datasets.load(place) for place in own or [folder]}
    return found


def _play(asked: argparse.Namespace, runs: dict[Path, xarray.Dataset]) -> Path:
    """Plays the bandit on the policies of each run, prints a table and draws the figure."""
    settings = (asked.episodes, asked.policies, asked.repeats, asked.seed)
    variable = protocol.variable_of(runs.values())
    curves = {place.name: protocol.bandit(protocol.returns_of(own, variable), *settings) for place, own in runs.items()}
    shown = [number for number in SHOWN if number <= asked.episodes]
    table = Table(
        "run", *map(str, shown), title=f"{variable} of the policy chosen after so many episodes, 95 % interval"
    )
    for name, curve in curves.items():
        cells = (f"{curve.mean[i - 1]:.1f} ({curve.low[i - 1]:.1f} to {curve.high[i - 1]:.1f})" for i in shown)
        table.add_row(name, *cells)
    Console().print(table)
    from purejax_bilevel.programs.offline import figures

    return figures.bandit(curves, variable, asked.output or next(iter(runs)) / "bandit.png")


if __name__ == "__main__":
    sys.exit(main())
