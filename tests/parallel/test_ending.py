"""Of many real ranks one fails: it tells why, and one of the others how many followed."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from colossus.errors import GOES_ON, MachineError, UserError
from colossus.layout import Layout
from colossus.parallel.ending import is_of_peer
from colossus.parallel.world import World
from tests.parallel.real_ranks import in_ranks

SIZE = 4
FIRST = f"LostPeer: lost another rank; {GOES_ON}"
ENDED = f"ended with it; {GOES_ON}"


def fail(kind: str, who: int, port: int) -> dict[str, Any]:
    """What a rank raises in the end."""
    if port:
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with World.join(Layout(dp_replicate=1, dp_shard=SIZE), "cpu") as world:
            world.sum([1.0])
            if kind == "user" or world.rank == who:
                _fail(kind)
            world.sum([1.0])
    except Exception as error:
        assert signal.getsignal(signal.SIGTERM) is before
        told = getattr(error, "told", False)
        return {"kind": type(error).__name__, "said": "" if told else str(error)}
    raise AssertionError("a sum without one of its ranks")


def _fail(kind: str) -> None:
    if kind == "user":
        raise UserError("a reason")
    if kind == "machine":
        raise MachineError("the disk")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("kind", "who", "agent", "lines"),
    [
        ("user", 0, True, ["UserError: a reason"]),
        ("machine", 2, True, ["MachineError: the disk", f"LostPeer: rank 2 failed; 3 others {ENDED}"]),
        ("bug", 1, True, ["ZeroDivisionError: a bug", f"LostPeer: rank 1 failed; 3 others {ENDED}"]),
        ("killed", 1, True, [FIRST, f"LostPeer: lost rank 1; 3 others {ENDED}"]),
        ("killed", 0, True, [FIRST, f"LostPeer: lost rank 0; 3 others {ENDED}"]),
        ("killed", 3, False, [FIRST, f"LostPeer: lost rank 3; 3 others {ENDED}"]),
        ("machine", 0, False, ["MachineError: the disk", f"LostPeer: rank 0 has ended; {GOES_ON}"]),
        ("killed", 0, False, [f"LostPeer: rank 0 has ended; {GOES_ON}"]),  # whose store ends with it
    ],
)
def test_one_tells_why_and_one_how_many_followed(kind: str, who: int, agent: bool, lines: list[str]) -> None:
    """agent: another process keeps the store, as torchrun's does."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
    lost = {who} if kind == "killed" else set()
    ends = in_ranks(SIZE, fail, kind, who, store.port if store else 0, lost=lost)
    told = [f"{end['kind']}: {end['said']}" for end in ends if end is not None and end["said"]]
    assert sorted(told) == sorted(lines)
    others = {end["kind"] for end in ends if end is not None and not end["said"]}
    assert others == {"UserError" if kind == "user" else "LostPeer"}


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (
            RuntimeError("[../gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MachineError("gloo/ in its text"), False),
        (ValueError("gloo/"), False),
    ],
)
def test_what_a_lost_rank_looks_like(error: Exception, is_so: bool) -> None:
    assert is_of_peer(error) is is_so
    wrapped = RuntimeError("in a step")
    wrapped.__cause__ = error
    assert is_of_peer(wrapped) is is_so
