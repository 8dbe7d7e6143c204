"""Finished runs and sweeps again, also on a machine without jax: tables and figures, a list, a comparison, a landscape.

python -m purejax_bilevel.results report runs/x
python -m purejax_bilevel.results list
python -m purejax_bilevel.results compare runs/x runs/y
python -m purejax_bilevel.results landscape runs/x
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from purejax_bilevel.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and does the work; returns the exit status: 0 done, 2 bad input."""
    asked = read_arguments(arguments)
    try:
        asked.work(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its `work` does what was asked."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m purejax_bilevel.results", description=__doc__, formatter_class=shape
    )
    actions = parser.add_subparsers(required=True, metavar="report | list | compare | landscape")
    own = actions.add_parser("report", help="a run's tables and figures, or a sweep's report, again")
    own.add_argument("folder", type=Path, help="of a run or a sweep")
    own.set_defaults(work=lambda asked: print(write(asked.folder)))
    own = actions.add_parser("list", help="the runs in a folder, the latest first")
    own.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    own.set_defaults(work=_list)
    own = actions.add_parser("compare", help="runs and sweeps in one table and one figure")
    own.add_argument("folders", type=Path, nargs="+", metavar="folder", help="of a run or a sweep")
    own.add_argument("--variable", default="", help="what is compared (default: what the first one reports)")
    own.add_argument(
        "--over", type=_share, default=0.0, help="mean over this share of a series, from its end (0: last)"
    )
    own.add_argument("--figure", type=Path, default=Path("comparison.png"), help="default: comparison.png")
    own.set_defaults(work=_compare)
    own = actions.add_parser("landscape", help="every setting, seed and evaluation, as a table and a figure")
    own.add_argument("folder", type=Path, help="of a run, or of one agent of a sweep")
    own.add_argument("--variable", default="", help="what is shown (default: the headline)")
    own.add_argument("--axes", nargs=2, default=(), metavar="name", help="of the figure (default: the first two)")
    own.add_argument("--table", type=Path, default=Path("landscape.csv"), help="default: landscape.csv")
    own.add_argument("--figure", type=Path, default=Path("landscape.png"), help="default: landscape.png")
    own.set_defaults(work=_landscape)
    return parser.parse_args(words)


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be a share of the run from 0 to 1, got {text}")
    return float(text)


def _list(asked: argparse.Namespace) -> None:
    from rich.console import Console

    from purejax_bilevel.results import runs  # here: `--help` needs no package

    Console().print(runs.listing(asked.folder))


def _compare(asked: argparse.Namespace) -> None:
    from rich.console import Console

    from purejax_bilevel.results import runs

    Console().print(runs.compare(asked.folders, asked.figure, asked.variable, asked.over))
    print(asked.figure)


def _landscape(asked: argparse.Namespace) -> None:
    from purejax_bilevel.results import landscape, runs

    found = runs.results_of(asked.folder, asked.folder.name)
    if len(found) > 1:
        names = ", ".join(result.name for result in found)
        raise UserError(f"{asked.folder} holds results of several agents ({names}): name the folder of one.")
    print(landscape.write_table(found[0].dataset, asked.table, asked.variable))
    print(landscape.draw(found[0].dataset, asked.figure, asked.axes, asked.variable))


def write(folder: Path) -> Path:
    """Writes a sweep's report, or prints a run's tables and draws its figures; returns the report or the folder.

    Raises:
        UserError: the folder holds neither.
    """
    from rich.console import Console

    from purejax_bilevel.results import dataset as datasets
    from purejax_bilevel.results import outputs, report

    if not (folder / datasets.FILE_NAME).is_file():
        report.write_again(folder)
        return folder / report.HTML
    dataset = datasets.load(folder)
    outputs.print_tables(dataset, Console())
    outputs.write_figures(dataset, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
