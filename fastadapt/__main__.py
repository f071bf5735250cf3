"""`python -m fastadapt` is the command `fastadapt`."""

import sys

from fastadapt._cli.main import main

if __name__ == "__main__":
    sys.exit(main())
