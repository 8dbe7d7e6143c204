"""Presets: sweep files of the studies that the original publications made, ready to run and with their figure.

Each file says what it studies. `smoke` takes minutes on two cores and shows the shape of the result; `paper` has the
originals' steps and many seeds: the sections under `paper` in place of those above it. The tabular studies take
seconds, so that both scales are the original's.
"""

from pathlib import Path
from typing import Any

from purejax_bilevel.errors import UserError
from purejax_bilevel.results.checks import load_yaml

SCALES = ("smoke", "paper")
PRESETS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


def preset(name: str, scale: str) -> dict[str, Any]:
    """A preset as the content of a sweep file.

    Raises:
        UserError: there is no such preset or scale.
    """
    if name not in PRESETS:
        raise UserError(f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a sweep file.")
    if scale not in SCALES:
        raise UserError(f"--scale must be one of {', '.join(SCALES)}, got {scale!r}.")
    path = Path(__file__).parent / f"{name}.yaml"
    content = load_yaml(path.read_text(), str(path))
    larger = content.pop("paper", {})
    return {"name": name, **content, **(larger if scale == "paper" else {})}
