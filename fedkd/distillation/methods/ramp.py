"""The published rise of a weight: ONE, OKDDip and PCL start with it."""

from fedkd.schedules import RampUpSchedule

RAMP = RampUpSchedule(end=1.0, until=0.27)
"""The weight of ONE, OKDDip and PCL as published: a Gaussian rise over 80 of 300 epochs."""
RAMP_DESCRIPTION = "weight of what the models tell each other; the published ramp over 27 %"
