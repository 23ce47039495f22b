"""``python -m dist_export`` and ``torchrun -m dist_export``."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and exit with its code."""
    try:
        from dist_export.cli import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # it came before or after main() handles it
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run()
