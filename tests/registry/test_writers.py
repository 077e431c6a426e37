"""Threads that write to a registry at a time: in one transaction, and each answers for its own faults."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import sqlalchemy as sa
from link_fakes import wait_until
from registries import device

from sliplm.errors import IdentityError, RegistryError
from sliplm.registry import Registry
from sliplm.registry.usage import Tokens


def test_many_writers(registry: Registry) -> None:
    one = registry.devices.add(device())
    failures: list[BaseException] = []

    def use(i: int) -> None:
        try:
            for j in range(5):
                registry.usage.begin(f"{i}-{j}", one)
                registry.usage.update([Tokens(f"{i}-{j}", 1, 1)])
                registry.usage.finish(Tokens(f"{i}-{j}", 1, 2), "stop")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and registry.usage.totals(one) == (40, 40, 80)


def test_what_comes_while_one_writes_is_written_in_one_transaction(registry: Registry) -> None:
    one = registry.devices.add(device())
    helper = registry.devices.add(device("helper", "bb", party="Acme", edge=False, helper=True))
    writes, begun, go, transactions = registry.usage._writes, threading.Event(), threading.Event(), []
    sa.event.listen(registry._db._engine, "commit", transactions.append)

    def first(_: sa.Connection) -> None:
        begun.set()
        assert go.wait(60)

    def begin(i: int) -> str:
        try:
            registry.usage.begin(f"{i}", helper if i == 7 else one)
            return "begun"
        except IdentityError as error:
            return str(error)

    with ThreadPoolExecutor(33) as threads:
        slow = threads.submit(writes.do, first)
        assert begun.wait(60)
        others = [threads.submit(begin, i) for i in range(32)]
        wait_until(lambda: len(writes._waiting) == 32)
        go.set()
        slow.result(60)
        said = [other.result(60) for other in others]
    assert len(transactions) == 2
    assert said.pop(7) == "the device 'helper' is enrolled as a helper and cannot be an edge: enrol it with --edge"
    assert set(said) == {"begun"} and registry.usage.totals(one).requests == 31


def test_an_error_of_the_database_concerns_all_that_were_written_together_and_none_after(registry: Registry) -> None:
    one = registry.devices.add(device())
    registry.usage.begin("r", one)
    writes, begun, go = registry.usage._writes, threading.Event(), threading.Event()

    def first(_: sa.Connection) -> None:
        begun.set()
        assert go.wait(60)

    with ThreadPoolExecutor(4) as threads:
        slow = threads.submit(writes.do, first)
        assert begun.wait(60)
        others = [threads.submit(registry.usage.begin, name, one) for name in ("r", "r1", "r2")]
        wait_until(lambda: len(writes._waiting) == 3)
        go.set()
        slow.result(60)
        errors = [other.exception(60) for other in others]
    assert all(isinstance(error, RegistryError) for error in errors) and len(set(map(id, errors))) == 3
    assert registry.usage.begin("r1", one).tokens == 0 and registry.usage.totals(one).requests == 2


def test_a_fault_of_one_that_writes_is_raised_to_it_and_the_others_may_try_again(registry: Registry) -> None:
    class Odd(Exception):
        """One that cannot be copied."""

        def __init__(self, one: int, two: int) -> None:
            super().__init__(one + two)

    def faulty(_: sa.Connection) -> None:
        raise Odd(1, 2)

    one, writes, begun, go = (
        registry.devices.add(device()),
        registry.usage._writes,
        threading.Event(),
        threading.Event(),
    )

    def first(_: sa.Connection) -> None:
        begun.set()
        assert go.wait(60)

    with ThreadPoolExecutor(4) as threads:
        slow = threads.submit(writes.do, first)
        assert begun.wait(60)
        others = [threads.submit(registry.usage.begin, name, one) for name in ("r1", "r2")]
        wrong = threads.submit(writes.do, faulty)
        wait_until(lambda: len(writes._waiting) == 3)
        go.set()
        slow.result(60)
        assert isinstance(wrong.exception(60), Odd)
        assert all(type(other.exception(60)) is RegistryError for other in others)
    assert registry.usage.begin("r1", one).tokens == 0 and registry.usage.totals(one).requests == 1
