"""What meta-training gives: agents under the objectives of all meta-seeds of some runs, on levels nobody learned on.

    python tests/benchmarks/objective_learning.py trained=runs/lpg untrained=runs/lpg_untrained
    python tests/benchmarks/objective_learning.py trained=runs/lpg --name test --levels 16 --figure profiles.png

Each member of each run is meta-tested beside A2C, one agent per level, in one compiled call. Printed are the mean
return, the interquartile mean with its 95 % interval (bootstrap of meta-seeds within each level) and the number of
levels with at least 75 % of A2C's return, of every meta-seed and of all. Exit status 1 where agents under an objective
of the first run reach 75 % on no more than half of the levels. The figure has performance profiles over A2C's return.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from purejax_bilevel import UserError  # first: this lets jax use all cores
from purejax_bilevel.programs.meta_objectives.network import ARTEFACT_KIND
from purejax_bilevel.programs.meta_objectives.program import NEAR
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results import plots, statistics
from purejax_bilevel.runtime import artefacts
from purejax_bilevel.studies import study, sweep
from purejax_bilevel.studies.arguments import Options

A2C = "a2c"


def members_of(runs: dict[str, str]) -> dict[str, list[str]]:
    """What `--model` names the objectives of each run by."""
    found = {label: artefacts.load(Path(run), ARTEFACT_KIND).about["members"] for label, run in runs.items()}
    return {label: [f"{runs[label]}#{number}" for number in range(len(own))] for label, own in found.items()}


def description_of(models: dict[str, list[str]], options: argparse.Namespace) -> dict[str, Any]:
    """The sweep that tests them all."""
    agents: dict[str, Any] = {A2C: {}}
    for label, own in models.items():
        agents |= {f"{label} {i}": {"agent_type": "lpg_agent", "model": model} for i, model in enumerate(own)}
    return {
        "name": "meta-test",
        "program": "meta_test",
        "settings": {"env_name": options.env_name, "env_workers": options.workers, "eval_frequency": 0},
        "agents": agents,
        "axes": [{"grid": {"level": list(range(options.levels))}}],
        "seeds": {"count": 1},
        "report": {"variable": "final_return", "baseline": A2C},
    }


def tested(models: dict[str, list[str]], options: argparse.Namespace) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns of A2C `[levels]`, and `[meta-seeds, levels]` under the objectives of each run."""
    folder = options.output_dir / options.name
    if not folder.exists():
        wanted = study.parse(description_of(models, options))
        sweep.run(wanted, Options(output_dir=options.output_dir, name=options.name), Console())

    def returns(label: str) -> np.ndarray:
        dataset = datasets.load(folder / datasets.file_name(label) / datasets.FILE_NAME)
        return statistics.member_scores(dataset, "final_return")[:, 0]

    found = {label: [returns(f"{label} {i}") for i in range(len(own))] for label, own in models.items()}
    return returns(A2C), {label: np.stack(own) for label, own in found.items()}


def row(label: str, scores: np.ndarray, a2c: np.ndarray) -> str:
    """A line of the table; scores are `[meta-seeds, levels]`."""
    estimate = statistics.stratified_bootstrap_interval(scores)
    interval = f" ({estimate.low:.2f} to {estimate.high:.2f})" if len(scores) > 1 else ""
    near = int((scores >= NEAR * a2c).sum())
    share = scores.mean() / a2c.mean()
    return (
        f"| {label} | {scores.mean():.2f} | {share:.0%} | {estimate.estimate:.2f}{interval} | {near} of {scores.size} |"
    )


def draw(a2c: np.ndarray, found: dict[str, np.ndarray], path: Path) -> None:
    """Share of meta-seeds and levels above each multiple of A2C's return; levels where that is 0 or less left out."""
    levels, multiples = a2c > 0, np.linspace(0.0, 1.2, 121)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.subplots()
        for label, scores in found.items():
            profile = statistics.performance_profile((scores / a2c)[:, levels], multiples)
            panel.step(multiples, profile.estimate, where="post", label=label)
            if len(scores) > 1:
                panel.fill_between(multiples, profile.low, profile.high, step="post", alpha=0.2)
        panel.axvline(NEAR, color="grey", linestyle=":")
        panel.set(xlabel="return over A2C's", ylabel="share of meta-seeds x levels above", ylim=(0, 1.02))
        panel.legend()
        figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="folders of meta-training")
    parser.add_argument("--env_name", default="GridWorld-small")
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--output_dir", type=Path, default=Path("runs"))
    parser.add_argument("--name", default="meta_test", help="folder of the meta-test; one that is there is read")
    parser.add_argument("--figure", type=Path, help="where to draw performance profiles")
    options = parser.parse_args()
    try:
        a2c, found = tested(members_of(dict(run.split("=", 1) for run in options.runs)), options)
    except UserError as error:
        parser.error(str(error))
    print("| objective | mean return | of A2C's | IQM | levels with at least 75 % of A2C's |")
    print("| --- | --- | --- | --- | --- |")
    print(row("A2C", a2c[None], a2c))
    for label, scores in found.items():
        print(row(f"{label}, all", scores, a2c))
        for number, own in enumerate(scores):
            print(row(f"{label}, meta-seed {number}", own[None], a2c))
    if options.figure:
        draw(a2c, found, options.figure)
    near = (next(iter(found.values())) >= NEAR * a2c).mean(1)
    return int(not (near > 0.5).all())


if __name__ == "__main__":
    sys.exit(main())
