"""The gateway as a command: flags in, one process or several."""

from __future__ import annotations

import sys

from gateway.run import run
from gateway.settings import GatewaySettings
from gateway.supervisor import supervise


def main() -> None:
    settings = GatewaySettings.from_command_line(sys.argv[1:])
    if settings.workers > 1:
        supervise(settings, run)
    run(settings)


if __name__ == "__main__":
    main()
