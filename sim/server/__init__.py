"""The server: rounds, replies and what is wrong with them, what was measured."""
