"""Faults and bad replies on purpose."""
