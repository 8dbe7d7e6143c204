"""Draws Grid-World levels (PNG) or an episode in one (GIF).

python -m purejax_bilevel.environments.grid_world levels.png --mode all --levels 12
python -m purejax_bilevel.environments.grid_world episode.gif --mode small --first 3
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from purejax_bilevel.environments import grid_world
from purejax_bilevel.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

FRAME_MILLISECONDS, LAST_MILLISECONDS = 150, 1500
MOST_FRAMES = 500
MOST_PICTURES = 144


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line.

    Raises:
        UserError: a value that is not allowed.
    """
    parser = argparse.ArgumentParser(prog="python -m purejax_bilevel.environments.grid_world", description=__doc__)
    parser.add_argument("file", type=Path, help="to write: .png for levels at their start, .gif for an episode in one")
    parser.add_argument("--mode", default="small", help=", ".join(grid_world.MODES))
    parser.add_argument("--first", type=int, default=0, help="number of the level, or of the first one")
    parser.add_argument("--levels", type=int, default=9, help="how many levels a PNG shows")
    parser.add_argument("--policy", choices=["optimal", "random"], help="of a GIF (default: optimal where it is known)")
    parser.add_argument("--seed", type=int, default=0, help="of a GIF's chances")
    asked = parser.parse_args(words)
    if asked.mode not in grid_world.MODES:
        raise UserError(f"--mode must be one of {', '.join(grid_world.MODES)}, got {asked.mode}.")
    tabular = grid_world.MODES[asked.mode].tabular
    asked.policy = asked.policy or ("optimal" if tabular else "random")
    if asked.policy == "optimal" and not tabular:
        raise UserError(f"--policy optimal is known for tabular modes only, not for --mode {asked.mode}; try random.")
    if asked.file.suffix not in (".png", ".gif"):
        raise UserError(f"the file must end in .png or .gif, got {asked.file}.")
    for name, low, high in (("first", 0, grid_world.MOST_LEVELS - MOST_PICTURES), ("levels", 1, MOST_PICTURES)):
        if not low <= getattr(asked, name) <= high:
            raise UserError(f"--{name} must be from {low} to {high}, got {getattr(asked, name)}.")
    if not 0 <= asked.seed < 2**32:
        raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {asked.seed}.")
    return asked


def main(words: Sequence[str] | None = None) -> int:
    """Reads the command line and draws; returns the exit status: 0 done, 2 bad input."""
    try:
        asked = read_arguments(words)
        _write(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(asked.file)
    return 0


def _write(asked: argparse.Namespace) -> None:
    from purejax_bilevel.environments.grid_world import pictures  # Pillow, which training does not need

    if asked.file.suffix == ".png":
        images = [pictures.levels_picture(asked.mode, range(asked.first, asked.first + asked.levels))]
    else:
        images = pictures.episode_pictures(asked.mode, asked.first, asked.policy, asked.seed, MOST_FRAMES)
    try:
        _save(images, asked.file)
    except OSError as error:
        raise UserError(f"{asked.file} cannot be written ({error.strerror or error}).") from error


def _save(images: "list[Image.Image]", file: Path) -> None:
    durations = [FRAME_MILLISECONDS] * (len(images) - 1) + [LAST_MILLISECONDS]
    if file.suffix == ".gif":
        images[0].save(file, save_all=True, append_images=images[1:], duration=durations, loop=0)
    else:
        images[0].save(file)


if __name__ == "__main__":
    sys.exit(main())
