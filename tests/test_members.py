"""Grids of members: how many there may be, and the configuration of all of them."""

import numpy as np
import pytest

from purejax_bilevel import members
from purejax_bilevel.errors import UserError
from purejax_bilevel.members import Axis, Grid, batch_config, grid_of
from tests import toy


def test_every_member_has_its_own_settings():
    axis = Axis(("noise", "lr"), ((0.5, 1), (0.25, 2)))
    grid = grid_of(toy.Config(width=(2, 7, 4)), (3, 4), (axis,))
    batched = batch_config(toy.Config(width=(2, 7, 4)), grid)
    assert len(grid) == 12
    for name in ("noise", "lr", "width"):
        np.testing.assert_array_equal(getattr(batched, name), [grid.settings(i)[name] for i in range(12)])
    assert (batched.noise.dtype, batched.lr.dtype, batched.width.dtype) == (np.float32, np.float32, np.int32)
    assert batched.max_width == 7


def test_too_many_members_are_refused_before_they_are_listed():
    axes = tuple(Axis((name,), tuple((i,) for i in range(1000))) for name in ("lr", "width", "noise"))
    with pytest.raises(UserError, match=r"1,000,000,000 members \(1,000 x 1,000 x 1,000\) are more than the 1,000,000"):
        Grid(axes, (0,))
    assert len(Grid(axes[:2], (0,))) == members.MOST_MEMBERS
