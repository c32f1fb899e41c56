"""python -m colocc ..."""

import sys

from colocc.cli import main

if __name__ == "__main__":
    sys.exit(main())
