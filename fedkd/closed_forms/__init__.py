"""Students whose training has a closed form, and what averaging their soft labels converges to.

Formulas and what they mean for research: docs/closed-forms.md.
"""

from fedkd.closed_forms.fixed_points import (
    fixed_point,
    fixed_points,
    mean_of,
    mean_of_others,
    one_before,
    rate,
)
from fedkd.closed_forms.students import (
    Kernel,
    Student,
    kernel_student,
    linear_kernel,
    linear_student,
    rbf,
    smoothing_student,
)

__all__ = [
    "Kernel",
    "Student",
    "fixed_point",
    "fixed_points",
    "kernel_student",
    "linear_kernel",
    "linear_student",
    "mean_of",
    "mean_of_others",
    "one_before",
    "rate",
    "rbf",
    "smoothing_student",
]
