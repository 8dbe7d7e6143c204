"""The distributions of Grid-World levels, by name: tables only.

Sources: Oh et al. 2020, "Discovering reinforcement learning algorithms", appendix (the five tabular levels); Jackson et
al. 2023, "Discovering general reinforcement learning algorithms with adversarial environment design" (GROOVE), appendix
(the rest), in the values of its released code.
"""

import dataclasses

from purejax_bilevel.environments.grid_world import mazes

Range = tuple[int, int]  # both ends belong to it


@dataclasses.dataclass(frozen=True)
class Kind:
    """Several objects of one type.

    Args:
        number: how many.
        reward: for collecting one.
        p_terminate: probability that collecting one ends the episode.
        p_respawn: probability per step that a collected one comes back.
    """

    number: int
    reward: float
    p_terminate: float
    p_respawn: float


@dataclasses.dataclass(frozen=True)
class LevelRange:
    """How one level is drawn.

    Args:
        grid: side of the grid, uniform.
        steps: time limit; its logarithm is uniform, then it is rounded.
        walls: flat cells, stride = side; or how many cells are drawn for them among those of the largest grid.
        kinds: objects; empty: drawn, each of its own type.
        objects: how many, uniform, where they are drawn.
        rewards: bounds of the uniform reward of all objects but the first, whose reward is in [0, 1].
    """

    grid: Range
    steps: Range
    walls: tuple[int, ...] | int = ()
    kinds: tuple[Kind, ...] = ()
    objects: Range = (0, 0)
    rewards: tuple[float, float] = (-1.0, 1.0)

    @property
    def most_objects(self) -> int:
        return sum(kind.number for kind in self.kinds) or self.objects[1]

    @property
    def most_types(self) -> int:
        return len(self.kinds) or self.objects[1]


@dataclasses.dataclass(frozen=True)
class Mode:
    """A distribution of levels: one setting, or several of the same sort that are equally likely.

    Args:
        settings: all with drawn objects or all with given ones.
        tabular: objects stay in their cells and observations enumerate the states; else they come back anywhere.
        lifetime: updates that an agent of meta-training lives; its logarithm is uniform, then it is rounded.
    """

    settings: tuple[LevelRange, ...]
    tabular: bool = True
    lifetime: Range = (2500, 2500)

    @property
    def max_grid_size(self) -> int:
        return max(setting.grid[1] for setting in self.settings)

    @property
    def max_objects(self) -> int:
        return max(setting.most_objects for setting in self.settings)

    @property
    def max_types(self) -> int:
        return max(setting.most_types for setting in self.settings)

    @property
    def horizon(self) -> int:
        """The longest time limit."""
        return max(setting.steps[1] for setting in self.settings)


def _fixed(grid: int, steps: int, kinds: tuple[Kind, ...], walls: tuple[int, ...] = ()) -> LevelRange:
    return LevelRange((grid, grid), (steps, steps), walls, kinds)


def _line(grid: int, gaps: Range, row: int | None = None, column: int | None = None) -> set[int]:
    """A wall through the whole grid, but for its gaps."""
    cells = (i for i in range(grid) if i not in gaps)
    return {row * grid + i if row is not None else i * grid + (column or 0) for i in cells}


_DENSE = _fixed(11, 500, (Kind(2, 1.0, 0.0, 0.05), Kind(1, -1.0, 0.5, 0.1), Kind(1, -1.0, 0.0, 0.5)))
_SPARSE = _fixed(13, 50, (Kind(1, 1.0, 1.0, 0.0), Kind(1, -1.0, 1.0, 0.0)))
_LONG = _fixed(11, 1000, (Kind(2, 1.0, 0.0, 0.01), Kind(2, -1.0, 0.5, 1.0)))
# The paper's level has five negative objects; the released code has three.
_LONGER = _fixed(9, 2000, (Kind(2, 1.0, 0.1, 0.01), Kind(3, -1.0, 0.8, 1.0)), tuple(sorted(_line(9, (1, 7), column=4))))
_LONG_DENSE = _fixed(
    11,
    2000,
    (Kind(4, 1.0, 0.0, 0.005),),
    tuple(sorted(_line(11, (0, 7), column=5) | _line(11, (2, 8), row=4))),
)
_TABULAR = {"dense": _DENSE, "sparse": _SPARSE, "long": _LONG, "longer": _LONGER, "long_dense": _LONG_DENSE}

_SMALL = LevelRange((4, 6), (20, 100), 7, objects=(1, 3))
_MEDIUM = LevelRange((6, 8), (100, 250), 10, objects=(2, 4))
_LARGE = LevelRange((8, 10), (250, 750), 15, objects=(2, 5))
_ALL = LevelRange((4, 10), (20, 750), 15, objects=(1, 5))
_DEBUG = LevelRange((3, 4), (5, 10), 4, objects=(1, 2))

_RANDOM = {
    "rand_dense": _DENSE,
    "rand_long": _LONG,
    "rand_small": _fixed(7, 500, (Kind(2, 1.0, 0.0, 0.05), Kind(2, -1.0, 0.5, 0.1)), (9, 25)),
    "rand_sparse": _fixed(7, 50, (Kind(1, 1.0, 1.0, 1.0), Kind(2, -1.0, 1.0, 1.0))),
    "rand_very_dense": _fixed(11, 2000, (Kind(1, 1.0, 0.0, 1.0),)),
    "rand_all": _ALL,
}
_TINY = _fixed(3, 50, (Kind(2, 1.0, 0.0, 1.0),))
_MAZES = {
    name: LevelRange((mazes.SIZE, mazes.SIZE), (25, 50), walls, objects=(3, 3), rewards=(0.0, 1.0))
    for name, walls in mazes.WALLS.items()
}

MODES: dict[str, Mode] = {
    "small": Mode((_SMALL,), lifetime=(250, 250)),
    "medium": Mode((_MEDIUM,), lifetime=(1000, 1000)),
    "large": Mode((_LARGE,)),
    "all": Mode((_ALL,), lifetime=(1000, 1000)),
    "all_shortlife": Mode((_ALL,), lifetime=(250, 250)),
    "all_randlife": Mode((_ALL,), lifetime=(50, 250)),
    "all_vrandlife": Mode((_ALL,), lifetime=(10, 250)),
    **{name: Mode((setting,)) for name, setting in _TABULAR.items()},
    "tabular": Mode(tuple(_TABULAR.values())),
    **{name: Mode((setting,), False, (25_000, 25_000)) for name, setting in _RANDOM.items()},
    "rand_tiny": Mode((_TINY,), False, (250, 250)),
    **{name: Mode((setting,)) for name, setting in _MAZES.items()},
    # Nine, as in the released code. `standard_maze` came later: with it `mazes` would draw other levels than before.
    "mazes": Mode(tuple(setting for name, setting in _MAZES.items() if name != "standard_maze")),
    "debug": Mode((_DEBUG,), lifetime=(4, 4)),
}
