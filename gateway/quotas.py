"""What one client may use: requests at a time, and tokens a minute. A client is an API key.

The tokens of a minute are a bucket that refills steadily. A prompt is paid when it is admitted, a completion
as it is generated, so that a bucket may go below zero; whoever is there waits until it is above. Without API
keys everybody is one client.
"""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protos.rpc.errors import OverloadedError

# Whom the current request is for. Set where keys are checked, read where requests are admitted.
current_client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")


@dataclass
class Account:
    """One client's use so far."""

    level: float
    filled_at: float
    num_requests: int = 0


class Quotas:
    """None means no limit."""

    def __init__(
        self,
        max_requests: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = max_requests
        self._tokens_per_minute = tokens_per_minute
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    @contextlib.contextmanager
    def request(self, num_prompt_tokens: int) -> Iterator[Callable[[int], None]]:
        """The time of one request of the current client; call what it yields with the tokens generated.

        Raises OverloadedError if the client is at a limit.
        """
        account = self._account(current_client.get())
        self._check(account)
        account.num_requests += 1
        account.level -= num_prompt_tokens

        def charge(num_tokens: int) -> None:
            account.level -= num_tokens

        try:
            yield charge
        finally:
            account.num_requests -= 1

    def _account(self, client: str) -> Account:
        now, limit = self._clock(), self._tokens_per_minute or 0
        account = self._accounts.setdefault(client, Account(limit, now))
        account.level = min(limit, account.level + (now - account.filled_at) * limit / 60)
        account.filled_at = now
        return account

    def _check(self, account: Account) -> None:
        if self._max_requests is not None and account.num_requests >= self._max_requests:
            message = f"this API key has {account.num_requests} requests running; it may have no more"
            raise OverloadedError(message, reason="TOO_MANY_REQUESTS", retry_after_seconds=1)
        if self._tokens_per_minute is not None and account.level <= 0:
            seconds = max(1.0, (1 - account.level) * 60 / self._tokens_per_minute)
            message = f"this API key has used its {self._tokens_per_minute} tokens a minute"
            raise OverloadedError(message, reason="TOKEN_RATE", retry_after_seconds=seconds)
