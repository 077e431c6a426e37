"""The experiments of `make soak`, small: a tiny model and a few of everything."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest

from bench.soak import fuzz, helpers, kills, streams, tamper, watch
from bench.soak.liar import LIES
from bench.soak.processes import Command
from sliplm.prg import expand

pytestmark = pytest.mark.slow


def test_tampered_answers_are_caught(tiny_split: Path) -> None:
    result = tamper.run(tiny_split, size=3 * len(LIES), fresh=False)
    assert not result["problems"]
    assert result["told"] == sum(result["caught"].values()) == 3 * len(LIES)
    assert result["honest requests"] > 0


def test_lies_of_helpers_are_caught_and_no_request_notices(tiny_split: Path) -> None:
    result = helpers.run(tiny_split, size=2 * len(helpers.LIES))
    assert not result["problems"]
    assert sum(result["helpers suspended for"].values()) == 2 * len(helpers.LIES) <= result["used, in part at least"]
    assert result["told"] >= result["used, in part at least"] and result["of them not found"] == 0
    assert result["requests"] > 0


def test_malformed_frames_disturb_nobody(tiny_split: Path) -> None:
    result = fuzz.run(tiny_split, size=2_000, fresh=False)
    assert not result["problems"]
    assert result["frames"] >= 2_000


def test_either_side_survives_the_other_s_death(tiny_split: Path) -> None:
    result = kills.run(tiny_split, size=4, seed=3)
    assert not result["problems"]
    assert min(result["kills"].values()) > 0
    assert result["rows seen by edges"] > 0


def test_streams_do_not_disturb_each_other(tiny_split: Path) -> None:
    result = streams.run(tiny_split, seconds=4, streams=6, edges=2, flat=1.0, fresh=False)
    assert not result["problems"]
    assert result["tokens"] > 0


def use_pads(twice: bool) -> None:
    from sliplm.pads.pad import Batch, Pad, Part
    from sliplm.pads.sources import SelfSource

    batch = Batch(SelfSource([]), [bytes(32)], 4, 4, np.zeros((4, 1), np.uint32))
    Pad([Part(batch, 0, 3)]).mask()
    Pad([Part(batch, 0 if twice else 3, 1)]).mask()


def blame_pads() -> None:
    from sliplm.pads.pad import Batch, Pad, Part

    class Nobody:
        name, parties = "h", frozenset({"h"})

        def reject(self) -> None: ...

    wrong, right = (Batch(Nobody(), [bytes([i]) * 32], 4, 4, np.full((4, 1), i, np.uint32)) for i in range(2))
    Pad([Part(wrong, 1, 2), Part(right, 0, 1)]).blame(lambda _, image: bool(image.all()))


def test_the_log_of_wrong_pads_has_those_and_no_others(tmp_path: Path) -> None:
    log, key = tmp_path / "found.log", os.urandom(32)
    command = Command(tmp_path, "pads", before=functools.partial(watch.wrong, log, key), main=blame_pads)
    assert command.wait() == 0
    assert watch.read(log) == set(watch.entries(key, expand(bytes(32), 1, 2, 4)))


@pytest.mark.parametrize("twice", [False, True])
def test_the_log_of_pads_shows_one_that_is_used_twice(tmp_path: Path, twice: bool) -> None:
    log, key = tmp_path / "pads.log", os.urandom(32)
    command = Command(
        tmp_path, "pads", before=functools.partial(watch.pads, log, key), main=functools.partial(use_pads, twice)
    )
    assert command.wait() == 0
    assert watch.count(log) == (4, int(twice))
