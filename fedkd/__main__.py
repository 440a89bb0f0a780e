"""``python -m fedkd``: the command line, which lives two floors up."""

from sim.cli import main

main()
