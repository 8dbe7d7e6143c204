"""Documents in blocks, written as Markdown beside its figures or as one HTML file with the figures inside."""

import base64
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path

from purejax_bilevel.errors import UserError


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    bold: int | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


Block = Heading | Paragraph | Code | Table | Picture


# ---------------------------------------------------------------- markdown


def as_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """The document as Markdown; figures are linked."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {_literal(text)}")
            case Paragraph(text):
                parts.append(_literal(text))
            case Code(text):
                fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
                parts.append(f"{fence}\n{text}\n{fence}")
            case Table(columns, rows, bold):
                parts.append(_markdown_table(columns, rows, bold))
            case Picture(path, caption):
                parts.append(f"![{_literal(caption)}]({path.relative_to(folder).as_posix()})")
    return "\n\n".join(parts) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None) -> str:
    lines = [[_literal(cell).replace("|", "\\|") for cell in line] for line in (columns, *rows)]
    if bold is not None:
        lines[bold + 1] = [f"**{cell}**" if cell else cell for cell in lines[bold + 1]]
    lines.insert(1, ["---" for _ in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _literal(text: str) -> str:
    """Text on one line that Markdown takes neither for HTML nor for a link."""
    return re.sub(r"([\[\]`])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 0.9rem; } td, th { text-align: left; padding: 0.25rem 0.8rem 0.25rem 0; }
th { border-bottom: 1px solid #888; } tr.best td { font-weight: 600; } td { border-bottom: 1px solid #eee; }
figure { margin: 1rem 0; } img { max-width: 100%; } figcaption { color: #555; font-size: 0.85rem; }
pre { background: #f5f5f5; padding: 0.6rem; overflow-x: auto; font-size: 0.85rem; }
"""


def as_html(blocks: Sequence[Block], title: str) -> str:
    """The document as one HTML file, figures inside."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{html.escape(text)}</p>")
            case Code(text):
                parts.append(f"<pre>{html.escape(text)}</pre>")
            case Table(columns, rows, bold):
                parts.append(_html_table(columns, rows, bold))
            case Picture(path, caption):
                if path.suffix != ".png":
                    raise UserError(f"a report holds png figures, not {path.name}")
                data = base64.b64encode(path.read_bytes()).decode()
                text = html.escape(caption)
                image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
                parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]], bold: int | None) -> str:
    cells = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = [f"<tr>{cells}</tr>"] if any(columns) else []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="best">{cells}</tr>' if number == bold else f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
