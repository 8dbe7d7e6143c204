"""Pictures of levels, and of agents in them.

Walls are grey, the agent is a blue diamond. Objects are discs, green for a positive reward and orange for a negative
one, whose area is its size; they fade with the probability that collecting one ends the episode. Colours tell apart
also for the colour-blind (Okabe and Ito).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from purejax_bilevel.environments import grid_world
from purejax_bilevel.environments.grid_world import optimum
from purejax_bilevel.environments.grid_world.levels import NUM_ACTIONS, Level
from purejax_bilevel.environments.grid_world.world import TIME_UNIT, GridWorld, State

INK, PAPER, WALL, LINE = "#222222", "#ffffff", "#7f7f7f", "#dddddd"
AGENT, GOOD, BAD = "#0072B2", (0, 158, 115), (213, 94, 0)
SIDE, LEGEND, GAP = 216, 82, 12  # pixels: of a level, of the lines below it, around both
LINE_HEIGHT = 11
Canvas = ImageDraw.ImageDraw


class Scene(NamedTuple):
    """What is seen of a state."""

    cell: int
    objects: dict[int, list[int]]  # cell -> numbers of the objects there


# --- what is seen -----------------------------------------------------------------------------------------------------


def scene_of_state(state: State) -> Scene:
    """The scene of one state, its leaves in numpy."""
    return _scene(int(state.cell), np.flatnonzero(state.object_exists), np.asarray(state.object_cell))


def scene_of_observation(world: GridWorld, level: Level, obs: np.ndarray) -> Scene:
    """The scene that an observation `[obs]` tells; of several objects of a type in a cell it tells one."""
    cells = world.mode.max_grid_size**2
    if world.mode.tabular:
        mask, cell = divmod(int(obs[:-1].argmax()), cells)
        return _scene(cell, [i for i in range(world.mode.max_objects) if mask >> i & 1], level.object_cell)
    objects: dict[int, list[int]] = {}
    for place in np.flatnonzero(obs[cells:-1]):
        of_type, cell = divmod(int(place), cells)
        objects.setdefault(cell, []).append(int(np.flatnonzero(level.object_type == of_type)[0]))
    return Scene(int(obs[:cells].argmax()), objects)


def _scene(cell: int, existing: Sequence[int] | np.ndarray, object_cell: np.ndarray) -> Scene:
    objects: dict[int, list[int]] = {}
    for i in existing:
        objects.setdefault(int(object_cell[i]), []).append(int(i))
    return Scene(cell, objects)


# --- drawing ----------------------------------------------------------------------------------------------------------


def paint(canvas: Canvas, level: Level, scene: Scene, corner: tuple[float, float], side: float) -> None:
    """Draws a scene.

    Args:
        canvas: to draw on.
        level: its leaves in numpy.
        scene: what is in it.
        corner: of the grid, the upper left one, in pixels.
        side: of the grid, in pixels.
    """
    grid = int(level.grid_size)
    size = side / grid

    def box(cell: int, part: float) -> tuple[float, float, float, float]:
        x, y = corner[0] + (cell % grid + 0.5) * size, corner[1] + (cell // grid + 0.5) * size
        return x - part * size / 2, y - part * size / 2, x + part * size / 2, y + part * size / 2

    for cell in range(grid * grid):
        canvas.rectangle(box(cell, 1.0), fill=WALL if level.wall[cell] else PAPER, outline=LINE)
    canvas.rectangle((*corner, corner[0] + side, corner[1] + side), outline=INK)
    for cell, numbers in scene.objects.items():
        for i in sorted(numbers, key=lambda i: -abs(level.object_reward[i])):
            part = 0.35 + 0.5 * math.sqrt(min(abs(float(level.object_reward[i])), 1.0))
            canvas.ellipse(box(cell, part), fill=_colour(level, i), outline=INK)
    left, top, right, bottom = box(scene.cell, 0.55)
    x, y = (left + right) / 2, (top + bottom) / 2
    canvas.polygon([(left, y), (x, top), (right, y), (x, bottom)], fill=AGENT, outline=PAPER)


def _colour(level: Level, i: int) -> tuple[int, ...]:
    colour = GOOD if level.object_reward[i] > 0 else BAD
    pale = 0.6 * min(float(level.object_p_terminate[i]), 1.0)
    return tuple(round((1 - pale) * part + pale * 255) for part in colour)


def level_picture(level: Level, scene: Scene, lines: Sequence[str]) -> Image.Image:
    """A scene with lines of text below, and what the objects do.

    Args:
        level: its leaves in numpy.
        scene: what is in it.
        lines: texts, at most two.
    """
    image = Image.new("RGB", (SIDE + 2 * GAP, SIDE + LEGEND + 2 * GAP), PAPER)
    canvas = ImageDraw.Draw(image)
    paint(canvas, level, scene, (GAP, GAP), SIDE)
    y = SIDE + GAP + 4
    for line in lines:
        canvas.text((GAP, y), line, fill=INK)
        y += LINE_HEIGHT
    for line, i in _kinds(level).items():
        canvas.ellipse((GAP, y + 3, GAP + 7, y + 10), fill=_colour(level, i), outline=INK)
        canvas.text((GAP + 12, y), line, fill=INK)
        y += LINE_HEIGHT
    return image


def _kinds(level: Level) -> dict[str, int]:
    """What objects do, in words, and the number of one that does."""
    kinds: dict[str, int] = {}
    for i in range(int(level.num_objects)):
        numbers = (level.object_reward[i], level.object_p_terminate[i], level.object_p_respawn[i])
        kinds.setdefault("reward {:+.2f}  ends {:.2f}  comes back {:.3f}".format(*numbers), i)
    return kinds


def sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, at most six in a row."""
    columns = min(len(pictures), max(1, math.ceil(math.sqrt(len(pictures)))), 6)
    width, height = pictures[0].size
    whole = Image.new("RGB", (width * columns, height * math.ceil(len(pictures) / columns)), PAPER)
    for i, picture in enumerate(pictures):
        whole.paste(picture, (width * (i % columns), height * (i // columns)))
    return whole


# --- levels and agents ------------------------------------------------------------------------------------------------


def levels_picture(mode: str, numbers: Sequence[int]) -> Image.Image:
    """Levels at their start, with the best return in them where it is known."""
    world = GridWorld(mode)
    reset = jax.jit(world.reset_env)
    pictures = []
    for number in numbers:
        level = grid_world.numbered(mode, number)
        state = jax.tree.map(np.asarray, reset(jax.random.key(number), level)[1])
        best = f"optimum {_optimum(level):.2f}" if world.mode.tabular else "objects come back anywhere"
        title = f"{mode} {number}: {int(level.max_steps_in_episode)} steps, {best}"
        pictures.append(level_picture(level, scene_of_state(state), [title]))
    return sheet(pictures)


def _optimum(level: Level) -> float:
    return float(jax.jit(optimum.optimal_return)(level))


def episode_pictures(mode: str, number: int, policy: str, seed: int, most_frames: int) -> list[Image.Image]:
    """An episode in a level, a picture per step.

    Args:
        mode: of the level.
        number: of the level.
        policy: "optimal" (tabular modes) or "random".
        seed: of the chances.
        most_frames: steps after which the pictures stop.
    """
    world, level = GridWorld(mode), grid_world.numbered(mode, number)
    steps = min(most_frames, int(level.max_steps_in_episode))
    states, rewards, alive = jax.jit(_play, static_argnums=(0, 2, 4))(world, level, policy, jax.random.key(seed), steps)
    collected = np.concatenate([[0.0], np.cumsum(rewards)])
    pictures = []
    for i in range(int(np.sum(alive)) + 1):
        scene = scene_of_state(jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), states))
        title = f"{mode} {number}: step {i} of {int(level.max_steps_in_episode)}"
        pictures.append(level_picture(level, scene, [title, f"return so far {collected[i]:.2f}, {policy} actions"]))
    return pictures


def _play(
    world: GridWorld, level: Level, policy: str, key: jax.Array, steps: int
) -> tuple[State, jax.Array, jax.Array]:
    """States `[steps + 1, ...]`, rewards and whether the episode was still going on `[steps]`."""
    reset_key, key = jax.random.split(key)
    first = world.reset_env(reset_key, level)[1]
    best = optimum.optimal_policy(level, world.mode.horizon) if policy == "optimal" else None

    def step(carry: tuple[State, jax.Array], i: jax.Array) -> tuple:
        state, alive = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        action = jax.random.randint(action_key, (), 0, NUM_ACTIONS)
        if best is not None:
            left = jnp.maximum(level.max_steps_in_episode - state.time, 1)
            action = best[left - 1, optimum.bits(state.object_exists), state.cell]
        _, after, reward, terminated, _ = world.step_env(step_key, state, action, level)
        carry = after, alive & ~(terminated | world.is_truncated(after, level))
        return carry, (after, jnp.where(alive, reward, 0.0), alive)

    played: tuple[State, jax.Array, jax.Array] = jax.lax.scan(step, (first, jnp.bool_(True)), jnp.arange(steps))[1]
    after, rewards, alive = played
    states = jax.tree.map(lambda start, rest: jnp.concatenate([start[None], rest]), first, after)
    return states, rewards, alive


def observation_drawing(name: str) -> Callable[[Canvas, np.ndarray, int], None]:
    """How a video draws step i of observations `[steps, obs]` of a Grid-World of that name."""
    world, level = grid_world.make(name)

    def draw(canvas: Canvas, observations: np.ndarray, i: int) -> None:
        width, height = canvas.im.size
        side = height - 34
        paint(canvas, level, scene_of_observation(world, level, observations[i]), ((width - side) / 2, 26), side)
        time = round(float(observations[i, -1]) / TIME_UNIT)
        canvas.text((8, 26), f"time {time}\nof {int(level.max_steps_in_episode)}", fill=INK)

    return draw
