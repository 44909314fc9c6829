"""``python -m async_batcher``: run the command ``async-batcher``."""

import sys

from async_batcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
