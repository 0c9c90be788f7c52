"""The scheduler's flags and environment variables."""

from __future__ import annotations

from pydantic import Field

from gateway.scheduler.scheduler import SchedulerConfig
from protos.rpc.settings import ServiceSettings, service_config


class SchedulerFlags(ServiceSettings):
    """The queue's limits, wherever the scheduler is hosted."""

    max_waiting: int = Field(1024, ge=0, description="most requests that wait for a worker")
    max_waiting_tokens: int = Field(
        8_000_000, ge=0, description="most tokens, prompts and completions, that wait for a worker"
    )
    queue_timeout: float = Field(60.0, gt=0, description="seconds a request waits for a worker")
    reconnect_grace: float = Field(
        10.0, ge=0, description="seconds for which requests wait for a worker that left to come back"
    )

    def scheduler_config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            queue_timeout_seconds=self.queue_timeout,
            reconnect_grace_seconds=self.reconnect_grace,
        )


class SchedulerSettings(SchedulerFlags):
    """Admits, queues and places requests of several gateways on the workers that register here.

    Every flag may be given in the environment instead: --max-waiting as WINT2_SCHEDULER_MAX_WAITING.
    """

    model_config = service_config("gateway.scheduler", "WINT2_SCHEDULER_")

    listen: str = Field(
        "127.0.0.1:8183", description='gRPC address: "host:port" (port 0 takes a free one) or "unix:/path"'
    )
