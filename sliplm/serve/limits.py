"""What a device may use: tokens a minute, and tokens a day.

Tokens are charged when they are there, prompt and answer alike, so nobody has to guess the length of an answer. A
request that began within its device's rate runs to its end, and what it took too much is a debt that later requests
wait for; over time the rate holds. The daily quota ends a request where it is used up.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from sliplm.errors import LimitError
from sliplm.registry.devices import Device, Limits, now
from sliplm.registry.usage import Used, midnight

DEFAULTS = Limits(concurrent=8, tokens_per_minute=0, daily_tokens=0)


class _Account:
    """One device's: the level of its token bucket, negative for debts, and what it used today."""

    def __init__(self, level: float, time: float, day: datetime) -> None:
        self.level, self.time = level, time
        self.day, self.used = day, 0


class Limiter:
    """Keeps count for all devices of this server. `defaults` stand in where a device has no limit of its own."""

    def __init__(
        self,
        defaults: Limits = DEFAULTS,
        clock: Callable[[], float] = time.monotonic,
        calendar: Callable[[], datetime] = now,
    ) -> None:
        self._defaults = defaults.over(DEFAULTS)
        self._clock, self._calendar = clock, calendar
        self._accounts: dict[int, _Account] = {}
        self._lock = threading.Lock()

    def concurrent(self, device: Device) -> int:
        """How many requests of `device` may generate at once; 0 for any number."""
        return device.limits.over(self._defaults).concurrent or 0

    def admit(self, device: Device) -> None:
        """Raises LimitError, with the seconds to wait, if the device's rate or quota is used up."""
        limits = device.limits.over(self._defaults)
        with self._lock:
            account = self._account(device, limits)
            if (rate := limits.tokens_per_minute) and account.level <= 0:
                wait = math.ceil((1 - account.level) * 60 / rate)
                raise LimitError(f"this device may use {rate} tokens a minute, and has: try again in {wait} s", wait)
            if limits.daily_tokens and account.used >= limits.daily_tokens:
                wait = math.ceil((account.day + timedelta(days=1) - self._calendar()).total_seconds())
                raise LimitError(f"this device may use {limits.daily_tokens} tokens a day (UTC), and has", wait)

    def recall(self, device: Device, used: Used) -> None:
        """Take note of what the registry has for today: this server may be new, or not the only one. If the day has
        ended since it was asked, it tells nothing."""
        with self._lock:
            account = self._account(device, device.limits.over(self._defaults))
            if used.day == account.day:
                account.used = max(account.used, used.tokens)

    def charge(self, device: Device, tokens: int) -> bool:
        """Count `tokens`; whether the daily quota leaves room for more."""
        limits = device.limits.over(self._defaults)
        with self._lock:
            account = self._account(device, limits)
            account.level -= tokens
            account.used += tokens
            return not limits.daily_tokens or account.used < limits.daily_tokens

    def _account(self, device: Device, limits: Limits) -> _Account:
        """Brought up to now. The bucket holds a minute's tokens."""
        full, time, day = float(limits.tokens_per_minute or 0), self._clock(), midnight(self._calendar())
        account = self._accounts.get(device.id)
        if account is None:
            account = self._accounts[device.id] = _Account(full, time, day)
        account.level = min(full, account.level + full * (time - account.time) / 60)
        account.time = time
        if account.day != day:
            account.day, account.used = day, 0
        return account
