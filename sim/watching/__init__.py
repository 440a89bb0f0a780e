"""Watching runs that another process makes: only files are read, and nothing is in its way."""
