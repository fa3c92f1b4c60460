"""`python -m cimjax`, the same as `cimjax`."""

import sys

from cimjax.cli import start

if __name__ == "__main__":
    sys.exit(start())
