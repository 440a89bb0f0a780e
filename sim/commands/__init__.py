"""What the command line and a notebook call: run, compare, distill, data, report."""
