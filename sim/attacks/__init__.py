"""Attacks on a finished run: what its clients' models and exchange tell of their private rows."""
