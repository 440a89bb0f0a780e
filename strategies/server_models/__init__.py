"""The server trains models of its own."""
