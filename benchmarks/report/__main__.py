"""``python -m benchmarks.report``: render the pages and plots."""

import sys

from benchmarks.report.render import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
