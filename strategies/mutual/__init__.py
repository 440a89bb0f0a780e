"""Clients teach each other."""
