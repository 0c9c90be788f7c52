"""The scheduler's flags and environment variables."""

from __future__ import annotations

from pydantic import Field, field_validator

from gateway.scheduler.scheduler import SchedulerConfig
from gateway.scheduler.static import DNS
from protos.rpc.settings import ServiceSettings, StringList, service_config


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

    static_worker: StringList = Field(
        (),
        description='address of a worker that does not register itself, or "dns:HOST:PORT" for all that a '
        "name has; may be repeated",
    )

    @field_validator("static_worker")
    @classmethod
    def _names_have_ports(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        for target in targets:
            if target.startswith(DNS) and not target.rpartition(":")[2].isdigit():
                raise ValueError(f"{target}: a name to look up needs a port, as in dns:workers:8191")
        return targets

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
