"""Clients exchange predictions of public rows."""
