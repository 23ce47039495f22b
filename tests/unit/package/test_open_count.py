"""The last user that leaves closes the files, and only if it says that it leaves."""

from __future__ import annotations

import gc

from dist_export.package.open_count import OpenCount


class User:
    """Anything that can be referred to weakly."""


def test_the_last_user_that_leaves_closes_once() -> None:
    closed: list[bool] = []
    count = OpenCount(lambda: closed.append(True))
    one, two = User(), User()
    leave_one, leave_two = count.join(one), count.join(two)
    leave_one()
    leave_one()
    assert closed == []
    leave_two()
    leave_two()
    assert closed == [True]


def test_a_user_that_is_gone_closes_nothing_and_is_not_waited_for() -> None:
    closed: list[bool] = []
    count = OpenCount(lambda: closed.append(True))
    gone, stays = User(), User()
    leave_gone, leave = count.join(gone), count.join(stays)
    del gone
    gc.collect()
    leave_gone()
    assert closed == []
    leave()
    assert closed == [True]
