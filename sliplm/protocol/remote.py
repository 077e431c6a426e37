"""The link over the network: the trusted end of an edge's WORK connection."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from time import perf_counter_ns

import numpy as np

from sliplm.errors import Code, LinkError, ProtocolError, SlipError
from sliplm.exchange.link import Field, Link, Own, Shape, States
from sliplm.protocol import frames
from sliplm.protocol.channel import SLOWEST, Arrival, Channel
from sliplm.protocol.frames import MAX_ROWS, OPEN_VERSION, Header, Kind

MANY_ROWS = 8
"""For the answer to so many the trusted side sleeps until it comes: a batch waits a little, and costs less."""

AHEAD = 3
"""Questions under way at once: one is being answered, one waits at the edge, one is on its way there or back."""

_RESULT, _PONG, _STATES = int(Kind.RESULT), int(Kind.PONG), int(Kind.STATES)  # enums are slow to look up and to compare


class RemoteLink(Link):
    """The trusted end of a WORK connection. The first failure, of whatever kind, closes it for good: an
    answer that comes too late can then never be taken for the answer to a later question.

    `shapes` gives (M, K) of every group, `party` is the edge's, `timeout` the seconds that one frame and its answer may
    take. `sending`, `waiting` and `receiving` are the nanoseconds spent so far on writing questions, on doing nothing
    until an answer began to arrive, and on reading answers.
    """

    def __init__(self, channel: Channel, shapes: Sequence[Shape], party: str, timeout: float = 30.0) -> None:
        self.party = party
        self.last_used = time.monotonic()
        self._channel = channel
        self._shapes = list(shapes)
        self._timeout = timeout
        self._sequence = 0
        self._expected: dict[tuple[int, int], float] = {}  # microseconds of waiting, by group and number of (few) rows
        self._lock = threading.Lock()
        self._ended = False
        self._closed = threading.Event()  # for whoever waits for that
        self.sending = self.waiting = self.receiving = 0
        channel.set_timeout(timeout)

    @property
    def alive(self) -> bool:
        return not self._ended

    def wait_closed(self, timeout: float) -> bool:
        """Whether the link closed within `timeout` seconds."""
        return self._closed.wait(timeout)

    def exchange(self, group: int, x: Field, own: Callable[[], Own]) -> tuple[Field, Own]:
        """See Link. Raises ValueError, without a word to the edge, for a question that no frame can ask."""
        # Checked in place, here and in `_ask`: one row's exchange has few calls, and they are counted.
        if not 0 <= group < len(self._shapes):
            raise ValueError(f"there is no group {group}")
        m, k = self._shapes[group]
        if x.ndim != 2 or x.shape[1] != k or x.dtype != np.uint32 or not 0 < len(x) <= MAX_ROWS:
            raise ValueError(f"group {group} takes (T, {k}) uint32, not {x.shape} {x.dtype}")
        y = np.empty((len(x), m), np.uint32)
        self._take_turn()
        try:
            channel = self._channel
            self._sequence = sequence = (self._sequence + 1) & 0xFFFFFFFF
            staged = channel.stage(len(x), k)
            staged[:] = x
            begin = perf_counter_ns()
            channel.send_staged(Kind.EXCHANGE, group, sequence, staged)
            sent = perf_counter_ns()
            mine = own()
            free = perf_counter_ns()
            few = len(x) < MANY_ROWS
            before = self._expected.get((group, len(x)), 0.0) if few else math.inf
            channel.await_input(before)
            there = perf_counter_ns()
            if not channel.comes((_RESULT, channel.version, group, len(x), sequence, y.nbytes)):
                raise self._refuse(channel.receive())
            channel.read_array(y)
            self.last_used = time.monotonic()
            if few:
                self._expected[group, len(x)] = 0.75 * before + 0.25e-3 * (there - free)
            self.sending += sent - begin
            self.waiting += there - free
            self.receiving += perf_counter_ns() - there
        except BaseException:
            self._give_up()
            raise
        finally:
            self._lock.release()
        return y, mine

    def exchanges(
        self, group: int, questions: Iterator[Field], own: Callable[[], object]
    ) -> Generator[Field, None, None]:
        """See Link: up to AHEAD questions are under way."""
        raised: list[Exception] = []
        under_way: deque[Arrival] = deque()
        first = True
        self._take_turn()
        try:
            for x in _until_one_raises(questions, raised):
                under_way.append(self._ask(group, x, under_way))
                if first:
                    own()
                    first = False
                if len(under_way) == AHEAD:
                    yield self._answer(under_way.popleft())
            while under_way:
                yield self._answer(under_way.popleft())
        except BaseException:
            self._give_up()
            raise
        finally:
            self._lock.release()
        if raised:
            raise raised[0]

    def compute(self, run: int, request: int, start: int, x: States, keep: bool) -> States:
        """See Link."""
        asked = frames.Blocks(request, start, 1 if x.dtype == np.float32 else 2, keep)
        payload = frames.pack_blocks(asked) + x.tobytes()
        y = np.empty_like(x)
        refused: SlipError | None = None
        self._take_turn()
        try:
            channel = self._channel
            if channel.version < OPEN_VERSION:
                raise LinkError(f"the edge speaks protocol version {channel.version}, without open blocks: update it")
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            channel.send(Kind.BLOCKS, payload, group=run, rows=len(x), sequence=self._sequence)
            channel.await_input(math.inf)
            if channel.comes((_STATES, channel.version, run, len(x), self._sequence, y.nbytes)):
                channel.read_array(y)
            else:
                header = channel.receive()
                if (header.kind, header.group) != (Kind.ERROR, Code.BUSY):
                    raise self._refuse(header)
                refused = channel.read_error(header)  # of this request: others may go on
            self.last_used = time.monotonic()
        except BaseException:
            self._give_up()
            raise
        finally:
            self._lock.release()
        if refused is not None:
            raise refused
        return y

    def forget(self, request: int) -> None:
        """See Link."""
        try:
            self._take_turn()
        except LinkError:
            return
        try:
            self._channel.send(Kind.DROP, frames.pack_drop(request))
        except LinkError:
            self._give_up()
        finally:
            self._lock.release()

    def ping(self) -> None:
        """Make sure that the edge is still there. Raises LinkError if not. Needless during an exchange."""
        if self._lock.locked():
            return
        self._take_turn()
        try:
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            self._channel.send(Kind.PING, sequence=self._sequence)
            if not self._channel.comes((_PONG, self._channel.version, 0, 0, self._sequence, 0)):
                raise self._refuse(self._channel.receive())
            self.last_used = time.monotonic()
        except BaseException:
            self._give_up()
            raise
        finally:
            self._lock.release()

    def _ask(self, group: int, x: Field, earlier: Iterable[Arrival]) -> Arrival:
        """Send a question, and take what comes of the `earlier` answers meanwhile; what its own answer will be."""

        def take() -> bool:
            for arrival in earlier:
                while not arrival.complete:
                    if not self._channel.advance(arrival):
                        if self._channel.has_header and not arrival.begun:
                            raise ProtocolError("the edge's answer does not belong to the question")
                        return True
            return False

        m, k = self._shapes[group]
        if x.ndim != 2 or x.shape[1] != k or x.dtype != np.uint32 or not 0 < len(x) <= MAX_ROWS:
            raise ValueError(f"group {group} takes (T, {k}) uint32, not {x.shape} {x.dtype}")
        y = np.empty((len(x), m), np.uint32)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        begin = perf_counter_ns()
        self._channel.send_array(Kind.EXCHANGE, group, self._sequence, np.ascontiguousarray(x), take)
        self.sending += perf_counter_ns() - begin
        return Arrival((_RESULT, self._channel.version, group, len(x), self._sequence, y.nbytes), y)

    def _answer(self, arrival: Arrival) -> Field:
        """Wait for an answer."""
        channel, y = self._channel, arrival.array
        deadline = time.monotonic() + self._timeout + y.nbytes / SLOWEST
        begin = perf_counter_ns()
        if not arrival.begun:
            channel.await_input(math.inf)
        there = perf_counter_ns()
        while not arrival.complete:
            if not channel.advance(arrival):
                raise self._refuse(channel.receive())
            if time.monotonic() > deadline:
                raise LinkError(f"{channel.peer} did not answer within {self._timeout:g} s")
        self.last_used = time.monotonic()
        self.waiting += there - begin
        self.receiving += perf_counter_ns() - there
        return y

    def _take_turn(self) -> None:
        """The channel to ourselves, for questions and their answers; whoever gets it releases the lock."""
        if not self._lock.acquire(timeout=self._timeout):
            raise LinkError(f"the edge was busy with other requests for {self._timeout:g} s")
        if self._ended:
            self._lock.release()
            raise LinkError("the connection to the edge is closed")

    def _give_up(self) -> None:
        self._ended = True
        self._closed.set()
        self._channel.close()

    def _refuse(self, header: Header) -> LinkError:
        if header.kind == Kind.ERROR:
            return ProtocolError(f"the edge answered: {self._channel.read_error(header)}")
        if header.kind in (Kind.RESULT, Kind.PONG, Kind.STATES):
            return ProtocolError("the edge's answer does not belong to the question")
        return ProtocolError(f"the edge sent {Kind(header.kind).name} out of turn")

    def close(self) -> None:
        self._ended = True
        self._closed.set()
        self._channel.abort()
        if self._lock.acquire(timeout=1.0):  # an exchange under way has been woken up, and closes by itself
            self._channel.close()
            self._lock.release()

    def __repr__(self) -> str:
        return f"RemoteLink({self._channel.peer}, {'alive' if self.alive else 'closed'})"


def _until_one_raises(questions: Iterator[Field], raised: list[Exception]) -> Iterator[Field]:
    """`questions` without an exception, which goes to `raised`: it is no failure of the link."""
    try:
        yield from questions
    except Exception as error:
        raised.append(error)
