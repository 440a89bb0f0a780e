"""Whether what is read fits into memory, told before it is read."""

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path


def check_room(shape: Sequence[int], what: str, *, remedy: str = "") -> None:
    """Refuse an array of float32 that does not fit; it is copied once, when rows are dealt.

    Args:
        shape: of the array.
        what: what it holds, in words.
        remedy: what makes it smaller, besides fewer rows.

    Raises:
        ValueError: saying how much it takes and how much there is.
    """
    needed, there = 2 * 4 * prod(int(side) for side in shape), memory_bytes()
    if needed > there:
        raise ValueError(
            f"{what} need {needed / 2**30:.1f} GiB of memory, and there are "
            f"{there / 2**30:.1f}: use {remedy}fewer rows (data.private_rows, data.public.size, "
            "data.test_rows)"
        )


def memory_bytes() -> int:
    """How much memory this process may have: the machine's, or its container's."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no such control group, or "max"
        return memory
