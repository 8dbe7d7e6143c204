"""Tables and figures of a finished run or sweep again, also on a machine without jax.

python -m purejax_bilevel.results report runs/x
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from purejax_bilevel.errors import UserError
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, report, statistics

CURVES = "learning_curves.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and writes; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m purejax_bilevel.results", description=__doc__)
    parser.add_argument("action", choices=["report"])
    parser.add_argument("folder", type=Path, help="of a run or a sweep")
    try:
        print(write(parser.parse_args(arguments).folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(folder: Path) -> Path:
    """Writes a sweep's report, or prints a run's table and draws its learning curves; returns the file.

    Raises:
        UserError: the folder holds neither.
    """
    if not (folder / datasets.FILE_NAME).is_file():
        report.write_again(folder)
        return folder / report.HTML
    dataset = datasets.load(folder)
    variable = report.reported_variable(dataset, report.Reporting())
    lower = statistics.lower_is_better(dataset, variable)
    title = str(dataset[variable].attrs.get("long_name", variable))
    statistics.render_table(statistics.summary_table(dataset, variable), Console(), title, lower)
    return plots.learning_curves(dataset, folder / CURVES, dataset.attrs["headline"], title=dataset.attrs["title"])


if __name__ == "__main__":
    sys.exit(main())
