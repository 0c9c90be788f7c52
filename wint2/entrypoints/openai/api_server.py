"""`wint2 serve` under the name of FastDeploy's server, so that its users change one word."""

from __future__ import annotations

import sys

from wint2.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
