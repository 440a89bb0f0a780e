"""A federated algorithm for fedkd, in a package of its own."""
