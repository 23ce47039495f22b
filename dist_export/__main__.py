"""``python -m dist_export`` and ``torchrun -m dist_export``."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and exit with its code."""
    from dist_export.cli import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
