"""``python -m fedkd``: the command line, which lives two floors up."""

from fedkd_start import main

main()
