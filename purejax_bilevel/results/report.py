"""Report of a sweep: report.html, complete in one file, and report.md beside its figures.

The best setting of every agent is chosen on seeds that are not reported. Everything is computed from the result files
in the sweep's folder, with rliable's statistics (`statistics.py`). Members that failed are counted against a setting
when it is chosen, left out of its numbers, and listed.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejax_bilevel.errors import UserError
from purejax_bilevel.members import bytes_in_words, counted, format_value
from purejax_bilevel.results import comparison, outputs, populations, relative, residuals, schedules, statistics
from purejax_bilevel.results import dataset as datasets
from purejax_bilevel.results.analysis import (
    SELECTION,
    AgentResult,
    Reporting,
    Sensitivity,
    along,
    analyse,
    curve,
    reported_variable,
    reporting,
    words,
)
from purejax_bilevel.results.checks import load_yaml, mapping_of
from purejax_bilevel.results.dataset import SEED, STEP, setting_dimensions
from purejax_bilevel.results.document import Block, Code, Heading, Paragraph, Picture, Table, as_html, as_markdown
from purejax_bilevel.results.statistics import setting_scores, stratified_bootstrap_interval

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "figures"
HISTORY = "search.json"  # all rounds of a search
SOLVED = {"CartPole-v1": 500.0}  # by environment
MOST_SETTINGS, MOST_FAILED = 40, 100  # rows shown


def write(folder: Path, name: str, report: Reporting, files: Sequence[Path]) -> list[AgentResult]:
    """Writes the report of a finished sweep and returns what it reports.

    Args:
        folder: of the sweep.
        name: of the sweep.
        report: what is measured and shown.
        files: results of each agent, in the order to be shown.
    """
    loaded = [datasets.load(file) for file in files]
    select = loaded[0].attrs["selection_seeds"]
    found = [analyse(str(dataset.attrs["agent"]), dataset, select, report) for dataset in loaded]
    _remove_figures(folder)
    (folder / FIGURES).mkdir(exist_ok=True)
    blocks = _Report(folder, name, report, found, files).blocks()
    datasets.write_text(folder / MARKDOWN, as_markdown(blocks, folder))
    datasets.write_text(folder / HTML, as_html(blocks, name))
    return found


def _remove_figures(folder: Path) -> None:
    """Deletes the figures that an earlier report shows, and no other file."""
    if (folder / MARKDOWN).exists():
        shown = re.findall(rf"\({FIGURES}/([\w.=+-]+\.png)\)", (folder / MARKDOWN).read_text(encoding="utf-8"))
        for name in shown:
            (folder / FIGURES / name).unlink(missing_ok=True)


def write_again(folder: Path) -> list[AgentResult]:
    """Writes the report of a sweep's folder from the files in it.

    Raises:
        UserError: it holds no finished sweep.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} holds neither a run nor a sweep (no {datasets.FILE_NAME}, no config.yaml).")
    description = mapping_of(load_yaml(path.read_text(), f"{path}"), f"{path}").get("sweep")
    if description is None:
        raise UserError(f"{path} is not of a sweep, and {folder} holds no {datasets.FILE_NAME}.")
    description = mapping_of(description, f"{path}: sweep")
    files = sorted(folder.glob(f"*/{datasets.FILE_NAME}"))
    if not files:
        raise UserError(f"{folder}: the sweep has no results yet; go on with it by sweep.py --resume {folder}.")
    labels = list(description.get("agents") or [])
    order = {str(datasets.load(file).attrs["agent"]): file for file in files}
    shown = sorted(order, key=lambda label: labels.index(label) if label in labels else len(labels))
    name = str(description.get("name", "sweep"))
    return write(folder, name, reporting(description.get("report")), [order[label] for label in shown])


class _Report:
    def __init__(self, folder: Path, name: str, report: Reporting, agents: list[AgentResult], files: Sequence[Path]):
        self.folder, self.name, self.report, self.agents, self.files = folder, name, report, agents, files
        first = agents[0].dataset
        self.about = first.attrs
        self.variable = reported_variable(first, report)
        self.lower = statistics.lower_is_better(first, self.variable)
        self.score_name = self.variable.replace("_", " ")
        self.solved = report.solved
        if self.solved is None and not self.lower:
            levels = {SOLVED.get(name) for name in self._environments()}
            self.solved = levels.pop() if len(levels) == 1 else None
        self.succeeded = [agent for agent in agents if np.isfinite(agent.best_runs).any()]
        self.scores = [(agent.label, agent.best_runs) for agent in self.succeeded]

    def blocks(self) -> list[Block]:
        return [
            Heading(self.name.replace("_", " "), 1),
            Paragraph(self._what()),
            *self._own_figures(),
            *self._best(),
            *self._improvement(),
            *self._profiles(),
            *self._by_task(),
            *populations.blocks(self.agents, self.lower, self._path),
            *schedules.blocks(self.agents, self._path),
            *self._relative(),
            *self._sensitivities(),
            *self._search(),
            *self._settings(),
            *self._failed(),
            *self._residuals(),
            *self._provenance(),
        ]

    # --- sections ---

    def _what(self) -> str:
        members = sum(agent.scores.size for agent in self.agents)
        environment = ", ".join(self._environments())
        programs = dict.fromkeys(agent.dataset.attrs["program"] for agent in self.agents)
        lengths = dict.fromkeys(
            f"{int(agent.dataset[STEP].values[-1]):,} {agent.dataset.attrs.get('step_name', 'steps')}"
            for agent in self.agents
        )
        seeds = len(self.agents[0].dataset[SEED])
        settings = sum(len(agent.settings) for agent in self.agents)
        text = (
            f"{counted(members, 'member')} ({counted(len(self.agents), 'agent')}, {counted(settings, 'setting')}, "
            f"{counted(seeds, 'seed')}) of the program{'s' if len(programs) > 1 else ''} {', '.join(programs)}"
            + (f" on {environment}" if environment else "")
            + f", {' or '.join(lengths)} each."
        )
        long_name = self.agents[0].dataset[self.variable].attrs.get("long_name", "")
        meaning = f" ({long_name})" if long_name not in ("", self.score_name) else ""
        measured = f"{self.score_name}{meaning}{self._span(self.report.over)}"
        return f"{text} Measured: {measured}, {'lower' if self.lower else 'higher'} is better."

    def _environments(self) -> list[str]:
        tasks = [words(task) for task in statistics.tasks_of(self.agents[0].dataset)]
        alone = str(self.about.get("environment") or "")
        return [task.partition("=")[2] for task in tasks] if any(tasks) else [alone] if alone else []

    def _span(self, over: float) -> str:
        return "" if over == 0 else f" (mean over the last {100 * over:.0f} % of the run)"

    def _own_figures(self) -> list[Block]:
        blocks: list[Block] = []
        for number, figure in enumerate(self.report.figures):
            title = str(figure.get("title", ""))
            if figure["kind"] == "sensitivity":
                blocks += self._sensitivity(figure["axis"], f"study-{number}.png", title)
            elif figure["kind"] == "curves":
                blocks += self._curves(figure["variable"], f"study-{number}.png", title)
            else:
                blocks += self._of_program(figure["figure"], f"study-{number}.png", title)
        return blocks

    def _best(self) -> list[Block]:
        rows = []
        for agent in self.agents:
            score = stratified_bootstrap_interval(agent.best_runs)
            failed = int(np.isnan(agent.scores).sum())
            used = int(np.isfinite(agent.best_runs).sum())
            row = [agent.label, words(agent.settings[agent.best]) or "its only one", score.in_words()]
            rows.append((*row, self._gap(agent.best_runs), str(used), f"{failed} of {agent.scores.size}"))
        gap = "optimality gap" + ("" if self.solved is None else f" to {self.solved:g}")
        columns = ("agent", "best setting", "IQM (95 % interval)", gap, "runs", "failed members")
        values = [
            stratified_bootstrap_interval(agent.best_runs).estimate * (-1 if self.lower else 1) for agent in self.agents
        ]
        bold = int(np.nanargmax(values)) if np.isfinite(values).any() else None
        blocks: list[Block] = [
            Heading("Best setting of each agent"),
            Paragraph(self._choice()),
            Table(columns, rows, bold),
        ]
        headline = str(self.about["headline"])
        if headline in [figure.get("variable") for figure in self.report.figures]:
            return blocks
        return blocks + self._curves(headline, "curves.png", "Best setting of each agent")

    def _choice(self) -> str:
        by, over = str(self.about["selected_by"]), float(self.about["selected_over"])
        measure = f"the interquartile mean of {by.replace('_', ' ')}{self._span(over)}"
        if SELECTION in self.agents[0].dataset:
            return (
                f"Chosen by a search, by {measure} on the seeds {_range(self.about['selection_seeds'])}; trained again "
                f"and reported on the seeds {_range(self.agents[0].dataset[SEED].values)}."
            )
        choosing = [agent for agent in self.agents if len(agent.chosen_on)]
        if not choosing:
            return "Every agent has one setting: nothing was chosen and all seeds are reported."
        agent = choosing[0]
        seeds = agent.dataset[SEED].values
        if len(seeds) == 1:
            return (
                f"Chosen by {measure}. There is one seed, which chooses and is reported: the best scores are too good."
            )
        only = "" if len(choosing) == len(self.agents) else " An agent with one setting is reported on all seeds."
        return (
            f"Chosen by {measure} on the seeds {_range(seeds[agent.chosen_on])}, reported on the others, "
            f"{_range(seeds[agent.reported])}.{only}"
        )

    def _gap(self, runs: np.ndarray) -> str:
        if self.solved is None or not np.isfinite(runs).any():
            return "-"
        sign = -1.0 if self.lower else 1.0
        return f"{float(statistics.optimality_gap(sign * runs, sign * self.solved)):.4g}"

    def _improvement(self) -> list[Block]:
        if len(self.succeeded) < 2:
            return []
        sign = -1.0 if self.lower else 1.0
        labels = [agent.label for agent in self.succeeded]
        matrix = np.full((len(labels), len(labels)), np.nan)
        rows = []
        for (i, x), (j, y) in itertools.permutations(enumerate(self.succeeded), 2):
            found = statistics.probability_of_improvement(sign * x.best_runs, sign * y.best_runs)
            matrix[i, j] = found.estimate
            if i < j:
                rows.append((x.label, y.label, f"{found.estimate:.2f} ({found.low:.2f} to {found.high:.2f})"))
        path = comparison.improvement(labels, matrix, self._path("improvement.png"))
        return [
            Heading("Probability of improvement"),
            Picture(path, "Probability that a run of X is better than one of Y, best settings."),
            Table(("X", "Y", "P(X better than Y) (95 % interval)"), rows),
        ]

    def _profiles(self) -> list[Block]:
        if not self.succeeded:
            return []
        path = comparison.profiles(self.scores, self.score_name, self._path("profiles.png"), self.lower)
        return [Heading("Performance profiles"), Picture(path, "Fraction of runs that are better than a score.")]

    def _by_task(self) -> list[Block]:
        found = relative.by_task(self.succeeded[0], self.scores) if self.succeeded else []
        return [Heading("By task"), *found] if found else []

    def _relative(self) -> list[Block]:
        baseline = next((agent for agent in self.succeeded if agent.label == self.report.baseline), None)
        if baseline is None:  # none is asked for, or all its runs failed
            return []
        path = self._path("relative_profiles.png")
        return relative.blocks(self.succeeded, baseline, self.lower, self.score_name, path)

    def _sensitivities(self) -> list[Block]:
        history = self._history()
        tried = [member for entry in history for part in entry["parts"] for member in part["members"]]
        settings = tried or [setting for agent in self.agents for setting in agent.settings]
        names = dict.fromkeys(name for setting in settings for name in setting if name != SEED)
        own = [figure.get("axis") for figure in self.report.figures]
        blocks: list[Block] = []
        for name in names:
            values = {repr(setting[name]) for setting in settings if name in setting}
            if name not in own and len(values) > 1:
                blocks += self._sensitivity(name, f"sensitivity-{name}.png", "")
        return [Heading("Sensitivity"), *blocks] if blocks else []

    def _search(self) -> list[Block]:
        history = self._history()
        if not history:
            return []
        choosing = str(self.about["selected_by"])
        lower = statistics.lower_is_better(self.agents[0].dataset, SELECTION)
        seeds = len(self.about["selection_seeds"])
        for entry in history:
            entry["quality"] = [
                setting_scores(_scores(part["scores"]).reshape(-1, seeds), lower) for part in entry["parts"]
            ]
        labels = [part["label"] for part in history[0]["parts"]]
        figure = comparison.rounds(history, labels, choosing.replace("_", " "), self._path("search.png"), lower)
        tried = sum(len(quality) for entry in history for quality in entry["quality"])
        return [
            Heading("Search"),
            Paragraph(f"{tried} trials of settings in {len(history)} rounds; all of them are in {HISTORY}."),
            Picture(figure, "Every setting tried; a line joins the best."),
        ]

    def _history(self) -> list[dict[str, Any]]:
        path = self.folder / HISTORY
        return json.loads(path.read_text()) if SELECTION in self.agents[0].dataset and path.is_file() else []

    def _settings(self) -> list[Block]:
        if all(len(agent.settings) == 1 for agent in self.agents):
            return []
        rows = []
        for agent in self.agents:
            for setting in agent.order:
                failed = int(np.isnan(agent.scores[setting]).sum())
                quality = agent.quality[setting] * (-1 if self._choosing_lower() else 1)
                chosen = format_value(float(f"{quality:.4g}")) if np.isfinite(quality) else "failed"
                name = words(agent.settings[setting]) or "its only one"
                score = stratified_bootstrap_interval(agent.runs(setting))
                rows.append((agent.label, name, chosen, score.in_words(), str(failed)))
        shown = rows
        if len(rows) > MOST_SETTINGS:
            each = max(1, MOST_SETTINGS // len(self.agents))
            shown = [row for agent in self.agents for row in [row for row in rows if row[0] == agent.label][:each]]
        note = "" if len(shown) == len(rows) else f" The best {len(shown)} of {len(rows)}; the result files hold all."
        return [
            Heading("Settings"),
            Paragraph(f"From best to worst on the choosing seeds.{note}"),
            Table(("agent", "setting", "score that chose", "IQM (95 % interval)", "failed"), shown),
        ]

    def _choosing_lower(self) -> bool:
        name = SELECTION if SELECTION in self.agents[0].dataset else str(self.about["selected_by"])
        return statistics.lower_is_better(self.agents[0].dataset, name)

    def _failed(self) -> list[Block]:
        names = []
        for agent in self.agents:
            seeds = agent.dataset[SEED].values
            tasks = statistics.tasks_of(agent.dataset)
            for setting, seed, task in np.argwhere(np.isnan(agent.scores)):
                member = {**tasks[task], **agent.settings[setting], "seed": seeds[seed].item()}
                names.append(f"{agent.label}: {words(member)}")
        total = sum(agent.scores.size for agent in self.agents)
        for entry in self._history():
            for part in entry["parts"]:
                total += len(part["scores"])
                names += [
                    f"{part['label']}, {entry['name'].replace('-', ' ')}: {words(member)}"
                    for member, score in zip(part["members"], part["scores"], strict=True)
                    if score is None
                ]
        if not names:
            return [Heading("Failed members"), Paragraph("None: every member ended with finite numbers.")]
        have, are = ("has", "is") if len(names) == 1 else ("have", "are")
        whole = counted(total, "member")
        text = f"{len(names)} of {whole} diverged or {have} no finite score, and {are} left out of all numbers above."
        listed = names[:MOST_FAILED] + ([f"and {len(names) - MOST_FAILED} more"] if len(names) > MOST_FAILED else [])
        return [Heading("Failed members"), Paragraph(text), Code("\n".join(listed))]

    def _residuals(self) -> list[Block]:
        sentences = [sentence for agent in self.agents for sentence in residuals.warnings(agent.dataset)]
        if not sentences:
            return []
        shown = sentences[:MOST_FAILED]
        more = [f"And {len(sentences) - MOST_FAILED} more settings."] if len(sentences) > MOST_FAILED else []
        return [Heading("Linear solvers that did not solve"), *map(Paragraph, [*shown, *more])]

    def _provenance(self) -> list[Block]:
        versions = dict(self.about.get("versions", {}))
        parts = counted(self.about["sub_programs"], "sub-program")
        facts = [
            ("device", f"{versions.pop('device', 'unknown')}, {self.about.get('devices', '?')} used"),
            ("compiled", f"{parts} in one call, {self.about['compile_seconds']:.1f} s"),
            ("ran", f"{self.about['run_seconds']:.1f} s"),
            (
                "state of a member",
                bytes_in_words(max(agent.dataset.attrs["bytes_per_member"] for agent in self.agents)),
            ),
            *versions.items(),
        ]
        command = (self.folder / "command.txt").read_text().strip() if (self.folder / "command.txt").is_file() else ""
        return [
            Heading("How it was run"),
            *([Code(command)] if command else []),
            Table(("", ""), [(str(name), str(value)) for name, value in facts]),
            Paragraph(
                "The sweep file is config.yaml; arrays of all members are in "
                + ", ".join(str(file.relative_to(self.folder)) for file in self.files)
                + "."
            ),
        ]

    # --- figures ---

    def _path(self, name: str) -> Path:
        return self.folder / FIGURES / name

    def _sensitivity(self, axis: str, name: str, title: str) -> list[Block]:
        if self._history():
            return self._tried(axis, name, title)
        lines = [along(agent, axis) for agent in self.succeeded]
        if not any(line.values for line in lines):
            return []
        path = comparison.sensitivity(lines, axis, self.score_name, self._path(name), title)
        others = any(
            len(agent.settings) > len(line.values) > 0 for agent, line in zip(self.succeeded, lines, strict=True)
        )
        words = f"{self.score_name} against {axis.replace('_', ' ')}"
        return [
            Picture(path, words + (", with the best of the other hyper-parameters at each value." if others else "."))
        ]

    def _tried(self, axis: str, name: str, title: str) -> list[Block]:
        """Every setting that a search tried, where all had done the same steps."""
        history = self._history()
        first = [entry for entry in history if entry["steps"] == min(other["steps"] for other in history)]
        lower, seeds = self._choosing_lower(), len(self.about["selection_seeds"])
        lines = []
        for number, part in enumerate(first[0]["parts"]):
            values, scores = [], []
            for entry in first:
                same = entry["parts"][number]
                quality = setting_scores(_scores(same["scores"]).reshape(-1, seeds), lower) * (-1 if lower else 1)
                values += [member.get(axis) for member in same["members"][::seeds]]
                scores += [stratified_bootstrap_interval(score) for score in quality[:, None]]  # one number each
            if None not in values:
                lines.append(Sensitivity(part["label"], tuple(values), tuple(scores), joined=False))
        if not lines:
            return []
        chosen_by = str(self.about["selected_by"]).replace("_", " ")
        path = comparison.sensitivity(lines, axis, f"{chosen_by} on the choosing seeds", self._path(name), title)
        return [
            Picture(
                path, f"Settings tried: {chosen_by} against {axis.replace('_', ' ')} after {first[0]['steps']} steps."
            )
        ]

    def _of_program(self, figure: str, name: str, title: str) -> list[Block]:
        modules = [outputs.own_figures(agent.dataset) for agent in self.succeeded]
        own_figures = next((module for module in modules if figure in getattr(module, "FIGURES", ())), None)
        if own_figures is None:
            return []
        axis = own_figures.AXES[figure]
        dimensions = None if axis is None else (axis,)  # None: the figure chooses a setting
        drawn = [agent for agent, module in zip(self.succeeded, modules, strict=True) if module is own_figures]
        fitting = [agent for agent in drawn if dimensions in (None, setting_dimensions(agent.dataset))]
        datasets = {agent.label: agent.dataset.isel({SEED: agent.reported}) for agent in fitting}
        if not datasets:  # an override or a search swept something else
            return []
        path = own_figures.FIGURES[figure](datasets, self._path(name))
        own_table = getattr(own_figures, "TABLES", {}).get(figure)
        statistic = "medians" if own_table else "means"
        picture = Picture(path, f"{title or figure.replace('_', ' ')}: {statistic} over the reported seeds.")
        return [picture, own_table(datasets, path)] if own_table else [picture]

    def _curves(self, variable: str, name: str, title: str) -> list[Block]:
        usable = [
            agent for agent in self.succeeded if variable in agent.dataset and STEP in agent.dataset[variable].dims
        ]
        groups: dict[tuple[str, tuple[int, ...]], list[AgentResult]] = {}  # by what a step is, and when it was measured
        for agent in usable:
            step_name = str(agent.dataset.attrs.get("step_name", "steps"))
            groups.setdefault((step_name, tuple(agent.dataset[STEP].values.tolist())), []).append(agent)
        measured = variable.replace("_", " ")
        pictures: list[Block] = []
        for number, ((step_name, steps), agents) in enumerate(groups.items()):
            series = [
                (agent.label, np.array(steps), curve(agent.dataset, agent.best, variable)[agent.reported])
                for agent in agents
            ]
            path = self._path(f"{number + 1}_{name}" if number else name)
            path = comparison.curves(series, step_name, measured, path, title)
            pictures.append(Picture(path, f"{measured} of the best setting of each agent."))
        return pictures


# ---------------------------------------------------------------- words


def _scores(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


def _range(seeds: Any) -> str:
    values = [int(seed) for seed in seeds]
    consecutive = values == list(range(values[0], values[0] + len(values)))
    return f"{values[0]} to {values[-1]}" if consecutive and len(values) > 2 else " and ".join(map(str, values))
