"""Objectives: what a student minimises, as a named, weighted sum of terms."""

from fedkd.objectives.composed import BoundObjective, Objective
from fedkd.objectives.table import TERMS, describe_terms
from fedkd.objectives.taps import LAST_MAP, PENULTIMATE, layer_shapes, tapped, vectors
from fedkd.objectives.terms import LayerTerm, Parts, Term
from fedkd.objectives.view import View

__all__ = [
    "LAST_MAP",
    "PENULTIMATE",
    "TERMS",
    "BoundObjective",
    "LayerTerm",
    "Objective",
    "Parts",
    "Term",
    "View",
    "describe_terms",
    "layer_shapes",
    "tapped",
    "vectors",
]
