"""Smaller models: pruning, int8 weights, students made of a teacher's layers, and their cost."""

from fedkd.compression.cost import ModelCost, measure_cost, model_file
from fedkd.compression.inheritance import (
    CopiedTensor,
    InheritanceReport,
    SkippedTensor,
    inherit,
)
from fedkd.compression.pruning import (
    PruningSettings,
    TensorSparsity,
    apply_masks,
    dense_state,
    load_dense_state,
    make_permanent,
    measure_sparsity,
    prune_weights,
    pruning_masks,
)
from fedkd.compression.quantisation import (
    QuantisationComparison,
    QuantisationSettings,
    QuantisedConv2d,
    QuantisedLinear,
    compare_quantised,
    load_quantised,
    quantise,
    quantised_header,
    quantised_layers,
    save_quantised,
)
from fedkd.compression.storage import plain_tensors, stored_bytes

__all__ = [
    "CopiedTensor",
    "InheritanceReport",
    "ModelCost",
    "PruningSettings",
    "QuantisationComparison",
    "QuantisationSettings",
    "QuantisedConv2d",
    "QuantisedLinear",
    "SkippedTensor",
    "TensorSparsity",
    "apply_masks",
    "compare_quantised",
    "dense_state",
    "inherit",
    "load_dense_state",
    "load_quantised",
    "make_permanent",
    "measure_cost",
    "measure_sparsity",
    "model_file",
    "plain_tensors",
    "prune_weights",
    "pruning_masks",
    "quantise",
    "quantised_header",
    "quantised_layers",
    "save_quantised",
    "stored_bytes",
]
