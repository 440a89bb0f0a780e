"""Exceptions of an author's code: whose they are, and what is shown of them."""

import traceback
from pathlib import Path

import torch

import sim
from sim.engine.deadline import DeadlineError

OURS = Path(sim.__file__).parent
"""Where the code lies that calls an author's."""

NO_ROOM = "DefaultCPUAllocator"
"""What torch says where the machine has no memory left, in an exception of no kind of its own."""


class NotFiniteError(ValueError):
    """A model's scores are NaN: it has diverged, and there is nothing to judge."""


MISFORTUNES = (DeadlineError, MemoryError, torch.OutOfMemoryError, NotFiniteError)
"""What may happen whatever the code says; all else is a mistake of the code."""


def is_misfortune(error: Exception) -> bool:
    """Tell whether this happens to code that is right."""
    return isinstance(error, MISFORTUNES) or NO_ROOM in str(error)


def author_traceback(error: Exception) -> str:
    """Return an exception's traceback, without the calls of ours that led to the author's code."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        if not Path(step.tb_frame.f_code.co_filename).is_relative_to(OURS):
            break
        step = step.tb_next
    return "".join(traceback.format_exception(type(error), error, step)).rstrip()
