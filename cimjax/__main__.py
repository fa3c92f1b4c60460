"""`python -m cimjax`, the same as `cimjax`."""

import sys

from cimjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
