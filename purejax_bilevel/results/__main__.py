"""Tables and figures of a finished run or sweep again, also on a machine without jax.

python -m purejax_bilevel.results report runs/x
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from purejax_bilevel.errors import UserError


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
    """Writes a sweep's report, or prints a run's tables and draws its figures; returns the report or the folder.

    Raises:
        UserError: the folder holds neither.
    """
    from rich.console import Console

    from purejax_bilevel.results import dataset as datasets  # here: `--help` needs none of them
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
