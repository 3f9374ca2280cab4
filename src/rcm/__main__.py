"""`python -m rcm STAGE`: the same as the console script `rcm`."""

import sys

from rcm.cli import main

if __name__ == "__main__":
    sys.exit(main())
