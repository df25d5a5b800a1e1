"""`python -m chronos` is the `chronos` command."""

from chronos.cli.main import main

main()
