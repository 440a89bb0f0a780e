"""Distillation on one machine: teachers, students, and ways to get from one to the other."""
