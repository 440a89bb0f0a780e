"""Averaged weights, with clients held near the global model."""
