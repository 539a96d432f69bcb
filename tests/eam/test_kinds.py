"""What a kind of frozen head saves, and which one is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from eamdeploy.eam.kinds import AUTO_KINDS, HeadSize, best_kinds, fitting, kinds_of
from eamdeploy.eam.options import FreezeOptions, check_options
from eamdeploy.errors import ConfigError

DEIT_TINY = HeadSize(tokens=197, rows=197, channels=192, head_dim=64)


def test_what_a_head_of_deit_tiny_saves() -> None:
    queries_and_keys, product = 2 * 197 * 192 * 64, 197 * 197 * 64
    assert DEIT_TINY.saved(None) == queries_and_keys + product
    values_and_output = 2 * 197 * 192 * 64
    pooled = 4 * (197 * 192 + 2 * 192 * 64 + 197 * 192)
    assert DEIT_TINY.saved(4) == queries_and_keys + values_and_output + 2 * product - pooled


def test_windows_count_and_rows_that_nothing_reads_do_not() -> None:
    four = HeadSize(49, 49, 96, 32, windows=4)
    assert four.saved(2) == 4 * HeadSize(49, 49, 96, 32).saved(2)
    class_token = HeadSize(197, 1, 192, 64)
    assert class_token.saved(None) == (197 + 1) * 192 * 64 + 197 * 64
    assert class_token.saved(1) < DEIT_TINY.saved(1)


@pytest.mark.parametrize(("rank", "kinds"), [("none", (None,)), ("auto", AUTO_KINDS), ("1", (1,)), ("16", (16,))])
def test_the_option_names_kinds(rank: str, kinds: tuple[int | None, ...]) -> None:
    assert kinds_of(rank) == kinds
    check_options(FreezeOptions(rank=rank))


@pytest.mark.parametrize("rank", ["0", "-1", "2.5", "", "all", "٣", "9" * 30])
def test_other_ranks_are_refused(rank: str) -> None:
    with pytest.raises(ConfigError, match="expected none, auto or a number from 1 on"):
        check_options(FreezeOptions(rank=rank))


def test_ranks_are_for_whole_heads_and_auto_needs_costs() -> None:
    with pytest.raises(ConfigError, match="rank 4 needs whole heads; expected granularity head; got row"):
        check_options(FreezeOptions(rank="4", granularity="row"))
    with pytest.raises(ConfigError, match="expected score sensitivity; got entropy"):
        check_options(FreezeOptions(rank="auto", score="entropy"))
    check_options(FreezeOptions(rank="4", score="entropy"))


def test_kinds_that_do_not_fit_or_save_nothing_are_left_out() -> None:
    assert fitting(AUTO_KINDS, HeadSize(4, 4, 64, 32)) == (None, 1, 2, 4)
    assert fitting(AUTO_KINDS, HeadSize(16, 16, 64, 1)) == (None, 1, 2)
    assert fitting((8,), HeadSize(4, 4, 64, 32)) == (8,), "one that is asked for is not left out in silence"


def test_the_least_damage_for_what_is_saved_wins() -> None:
    damage = np.array([[1.0, 1.0, 0.0], [2.1, 1.9, 0.0], [2.0, 3.0, 0.1]])
    assert best_kinds(damage, (1, 2, 2)).tolist() == [0, 1, 0]
    assert best_kinds(damage[:1], (0,)).tolist() == [0, 0, 0]
