"""``python -m lightning_prune``: the same as the ``lightning-prune`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
