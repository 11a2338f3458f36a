"""python -m merge3.client: the command where no entry point is installed."""

from merge3.client.cli import main

main()
