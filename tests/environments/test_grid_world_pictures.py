"""Pictures of Grid-Worlds: what they show is what is there, and the command that draws them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from purejax_bilevel import RLConfig, run
from purejax_bilevel.environments import grid_world
from purejax_bilevel.environments.grid_world import __main__ as command
from purejax_bilevel.environments.grid_world import pictures
from purejax_bilevel.environments.grid_world.world import GridWorld, State
from purejax_bilevel.studies import video

SIDE = 140


@pytest.mark.parametrize("mode", ["small", "tabular", "rand_small"])
def test_an_observation_tells_the_scene(mode: str) -> None:
    world, level = GridWorld(mode), grid_world.numbered(mode, 1)
    free = np.flatnonzero(level.free)
    for seed in range(10):
        chance = np.random.default_rng(seed)
        cells = chance.permutation(free)[: world.mode.max_objects].astype(np.int32)
        cells = level.object_cell if world.mode.tabular else cells
        exists = (chance.random(world.mode.max_objects) < 0.6) & np.asarray(level.used)
        state = State(np.int32(3), np.int32(chance.choice(free)), cells, exists, np.bool_(False))
        obs = np.asarray(world.observe_state(jax.tree.map(jnp.asarray, state), level))
        told, expected = pictures.scene_of_observation(world, level, obs), pictures.scene_of_state(state)
        assert told.cell == expected.cell
        assert set(told.objects) == set(expected.objects)
        for cell, (number,) in told.objects.items():
            assert level.object_reward[number] == level.object_reward[expected.objects[cell][0]]


def test_colours_are_where_things_are() -> None:
    level = grid_world.numbered("tabular", 3)  # walls, objects of both signs
    scene = pictures.Scene(int(level.start_cell), {int(cell): [i] for i, cell in enumerate(level.object_cell)})
    image = Image.new("RGB", (SIDE, SIDE))
    pictures.paint(ImageDraw.Draw(image), level, scene, (0, 0), SIDE)
    grid = int(level.grid_size)

    def colour(cell: int) -> tuple[int, ...]:
        return image.getpixel((int((cell % grid + 0.5) * SIDE / grid), int((cell // grid + 0.5) * SIDE / grid)))

    assert colour(scene.cell) == ImageColor.getrgb(pictures.AGENT)
    walls = {cell for cell in range(grid * grid) if colour(cell) == ImageColor.getrgb(pictures.WALL)}
    assert walls == set(np.flatnonzero(level.wall[: grid * grid]).tolist())
    for cell, (number,) in scene.objects.items():
        red, green, _ = colour(cell)
        assert (green > red) == (level.object_reward[number] > 0)
    empty = set(range(grid * grid)) - walls - set(scene.objects) - {scene.cell}
    assert {colour(cell) for cell in empty} == {ImageColor.getrgb(pictures.PAPER)}


def test_the_command_draws_levels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "levels.png"
    assert command.main([str(file), "--mode", "debug", "--levels", "3", "--first", "2"]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    picture = pictures.levels_picture("debug", range(2, 5))
    with Image.open(file) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))
    assert not np.array_equal(np.asarray(picture), np.asarray(pictures.levels_picture("debug", range(3))))


def test_the_command_plays_an_episode(tmp_path: Path) -> None:
    file = tmp_path / "episode.gif"
    assert command.main([str(file), "--mode", "debug"]) == 0
    level = grid_world.numbered("debug", 0)
    with Image.open(file) as image:
        assert 1 < image.n_frames <= level.max_steps_in_episode + 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("a.png --mode tiny", "--mode must be one of small, medium"),
        ("a.jpg", "must end in .png or .gif, got a.jpg"),
        ("a.png --levels 0", "--levels must be from 1 to 144, got 0"),
        ("a.png --first -1", "--first must be from 0"),
        ("a.gif --seed -1", "--seed must be from 0"),
        ("a.gif --mode rand_small --policy optimal", "--policy optimal is known for tabular modes only"),
        ("/nowhere/a.png --mode debug --levels 1", "cannot be written"),
    ],
)
def test_bad_input_is_told_in_a_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture) -> None:
    assert command.main(words.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert sentence in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_an_agent_trains_on_a_level_and_its_video_shows_the_level() -> None:
    sizes = {"num_train_steps": 20, "init_steps": 10, "batch_size": 8, "capacity": 20, "eval_frequency": 10}
    config = RLConfig(
        agent_type="sql", env_name="GridWorld-debug", hidden_dim=4, eval_episodes=1, final_eval_episodes=2, **sizes
    )
    results = run(config, quiet=True)
    assert np.isfinite(results.evaluation_return).all()
    world, level = grid_world.make("GridWorld-debug")
    obs = np.asarray(world.reset_env(jax.random.key(0), level)[0])
    frame = Image.new("RGB", video.SIZE, video.PAPER)
    video._drawing("GridWorld-debug")(ImageDraw.Draw(frame), obs[None], 0)
    colours = {colour for _, colour in frame.getcolors(maxcolors=10**6)}
    assert ImageColor.getrgb(pictures.AGENT) in colours
    assert video._drawing("Probe") is video._draw_series
