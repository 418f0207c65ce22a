"""`python -m dskjax`: the command line."""

from dskjax.cli import main

main()
