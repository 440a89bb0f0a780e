"""A federated algorithm for fedkd, in a package of its own."""

from my_method.method import MyMethod

__all__ = ["MyMethod"]
