"""``python -m gpurestore``: the command line without an installed script."""

import sys

from gpurestore.cli import main

if __name__ == "__main__":
    sys.exit(main())
