"""Knowledge distillation: losses, targets, schedules, models, data, training and metrics.

This floor stands alone: it imports neither Flower nor Ray.
"""
