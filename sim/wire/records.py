"""Payloads and arrays in Flower's records, and back."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedkd.exchange.payload import Payload
from fedkd.exchange.values import flatten, unflatten
from fedkd.training import Arrays


def arrays_name(name: str) -> str:
    """Return the name of the record that holds the arrays of a payload."""
    return f"{name}-arrays"


def write_payload(records: RecordDict, name: str, payload: Payload | None) -> None:
    """Put a payload into two records of one name; None leaves the records as they are."""
    if payload is None:
        return
    flat = flatten(payload)
    records[name] = ConfigRecord({"kind": payload.kind, "plain": json.dumps(flat.plain)})
    records[arrays_name(name)] = to_array_record(flat.arrays)


def read_payload(records: RecordDict, name: str) -> Payload | None:
    """Return the payload of that name, or None where there is none.

    Raises:
        ValueError: for what is no payload of a known kind.
    """
    if name not in records.config_records:
        return None
    plain = plain_of(records.config_records[name])
    payload = unflatten(from_array_record(records.array_records[arrays_name(name)]), plain)
    if not isinstance(payload, Payload):
        raise ValueError(f"no payload, but {str(payload)[:40]!r}")
    return payload


def plain_of(record: Mapping[str, Any]) -> Any:
    """Return the plain values of a payload from its record.

    Raises:
        ValueError: for what is no JSON.
    """
    plain = record.get("plain")
    if not isinstance(plain, str):
        raise ValueError("the plain values of a payload are a text")
    return json.loads(plain)


def to_array_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Turn named NumPy arrays into a Flower record."""
    # Not np.ascontiguousarray: it turns the 0-d counters of BatchNorm into vectors.
    return ArrayRecord({name: Array(np.asarray(a, order="C")) for name, a in arrays.items()})


def from_array_record(record: ArrayRecord) -> Arrays:
    """Turn a Flower record into named NumPy arrays."""
    return {name: array.numpy() for name, array in record.items()}
