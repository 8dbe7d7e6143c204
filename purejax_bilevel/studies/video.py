"""A GIF of one episode of the median member's policy.

Drawn with Pillow from observations: the usual renderers need pygame. CartPole, Acrobot, MountainCar and Grid-Worlds
look like themselves; any other environment is shown as its observations over time.
"""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from purejax_bilevel.errors import UserError
from purejax_bilevel.program import Part
from purejax_bilevel.results.dataset import write_bytes
from purejax_bilevel.runtime.arrays import typed_state

FILE_NAME = "policy.gif"
SIZE = (400, 240)
MOST_FRAMES = 250  # longer episodes skip steps
FRAME_MILLISECONDS = 40
INK, ACCENT, PAPER = "#222222", "#0072B2", "#ffffff"


def check(program: Any) -> None:
    """Whether a program has a policy to show.

    Raises:
        UserError: it has none.
    """
    if not hasattr(program, "episode"):
        raise UserError(f"--video: {type(program).__name__} has no policy to show.")


def median_member(scores: np.ndarray) -> int:
    """The member whose score is the (upper) median; members that failed (not finite) count as the worst."""
    order = np.argsort(np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    return int(order[len(order) // 2])


def write_video(part: Part, state: Any, member: int, step: int, path: Path) -> Path:
    """Plays one episode of a member and writes it as a GIF.

    Args:
        part: the sub-program; it must offer `episode`.
        state: host state of all members, as the runner returns it.
        member: whose policy.
        step: steps of training done.
        path: file to write.
    """
    own_config = jax.tree.map(lambda leaf: leaf[member], part.config)
    own_state = typed_state(part, jax.tree.map(lambda leaf: leaf[member], state[0]))
    episode = part.program.episode  # type: ignore[attr-defined]
    observations, alive = jax.jit(episode)(own_state, own_config, np.int32(step - 1))
    shown = np.asarray(observations)[np.asarray(alive)]
    return write_gif(shown, str(getattr(part.config, "env_name", "")), part.grid.describe(member), path)


def write_gif(observations: np.ndarray, env_name: str, title: str, path: Path) -> Path:
    """Draws an episode.

    Args:
        observations: `[steps, obs]`.
        env_name: says how they look.
        title: above the picture.
        path: file to write.
    """
    stride = math.ceil(len(observations) / MOST_FRAMES)
    draw, frames = _drawing(env_name), []
    for i in range(0, len(observations), stride):
        image = Image.new("RGB", SIZE, PAPER)
        canvas = ImageDraw.Draw(image)
        draw(canvas, observations, i)
        canvas.text((8, 6), f"{title}   step {i + 1} of {len(observations)}", fill=INK)
        frames.append(image)
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS * stride, loop=0)
    write_bytes(path, buffer.getvalue())
    return path


def _drawing(env_name: str) -> Callable[[ImageDraw.ImageDraw, np.ndarray, int], None]:
    from purejax_bilevel.environments import grid_world  # here: it makes jax choose its devices, before processes join
    from purejax_bilevel.environments.grid_world import pictures

    if grid_world.known(env_name):
        return pictures.observation_drawing(env_name)
    return _DRAWINGS.get(env_name, _draw_series)


def _draw_cart_pole(canvas: ImageDraw.ImageDraw, observations: np.ndarray, i: int) -> None:
    position, angle = observations[i, 0], observations[i, 2]
    width, height = SIZE
    x, y = width / 2 + position * width / 2 / 2.6, height * 0.75
    canvas.line((0, y + 15, width, y + 15), fill=INK)
    canvas.rectangle((x - 25, y - 10, x + 25, y + 10), fill=INK)
    tip = (x + 100 * math.sin(angle), y - 100 * math.cos(angle))
    canvas.line((x, y, *tip), fill=ACCENT, width=8)


def _draw_acrobot(canvas: ImageDraw.ImageDraw, observations: np.ndarray, i: int) -> None:
    cos1, sin1, cos2, sin2 = observations[i, :4]
    first = math.atan2(sin1, cos1)
    second = first + math.atan2(sin2, cos2)
    width, height = SIZE
    unit, root = height / 5, (width / 2, height / 2)
    canvas.line((0, root[1] - unit, width, root[1] - unit), fill=INK)
    elbow = (root[0] + unit * math.sin(first), root[1] + unit * math.cos(first))
    tip = (elbow[0] + unit * math.sin(second), elbow[1] + unit * math.cos(second))
    canvas.line((*root, *elbow), fill=INK, width=8)
    canvas.line((*elbow, *tip), fill=ACCENT, width=8)


def _draw_mountain_car(canvas: ImageDraw.ImageDraw, observations: np.ndarray, i: int) -> None:
    def place(position: float) -> tuple[float, float]:
        height = math.sin(3 * position) * 0.45 + 0.55
        return (position + 1.2) / 1.8 * SIZE[0], SIZE[1] * (0.95 - 0.7 * height)

    canvas.line([place(x) for x in np.linspace(-1.2, 0.6, 100)], fill=INK, width=2)
    goal = place(0.5)
    canvas.line((*goal, goal[0], goal[1] - 30), fill=INK, width=2)
    x, y = place(float(observations[i, 0]))
    canvas.ellipse((x - 9, y - 18, x + 9, y), fill=ACCENT)


def _draw_series(canvas: ImageDraw.ImageDraw, observations: np.ndarray, i: int) -> None:
    low, high = observations.min(0), observations.max(0)
    scaled = (observations - low) / np.maximum(high - low, 1e-9)
    rows = observations.shape[1]
    for number in range(rows):
        top, step = 24 + number * (SIZE[1] - 30) / rows, (SIZE[1] - 30) / rows * 0.8
        points = [
            (8 + t / max(len(observations) - 1, 1) * (SIZE[0] - 16), top + step * (1 - scaled[t, number]))
            for t in range(i + 1)
        ]
        canvas.line([*points, points[-1]], fill=ACCENT, width=2)


_DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw, np.ndarray, int], None]] = {
    "CartPole-v1": _draw_cart_pole,
    "Acrobot-v1": _draw_acrobot,
    "MountainCar-v0": _draw_mountain_car,
}
