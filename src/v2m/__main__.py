"""`python -m v2m` is the command `v2m`."""

import sys

from v2m.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
