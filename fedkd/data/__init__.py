"""Rows for a federation: sources, disjoint splits, partitions and a picture of them."""

from fedkd.data.federated import FederatedData, build_federated_data
from fedkd.data.overview import plot_split, split_table
from fedkd.data.partition_settings import PartitionSettings
from fedkd.data.public_source import public_source_digests, public_source_files
from fedkd.data.settings import DataSettings, PublicSettings
from fedkd.data.sources import source_digests, source_files, view_digests, view_files

__all__ = [
    "DataSettings",
    "FederatedData",
    "PartitionSettings",
    "PublicSettings",
    "build_federated_data",
    "plot_split",
    "public_source_digests",
    "public_source_files",
    "source_digests",
    "source_files",
    "split_table",
    "view_digests",
    "view_files",
]
