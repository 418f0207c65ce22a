"""`python -m serve`: the same command as `dskjax serve`."""

import sys

from dskjax.cli import main

sys.argv.insert(1, "serve")
main()
