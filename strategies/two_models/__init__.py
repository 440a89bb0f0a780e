"""Clients with two models, one of which travels."""
