"""Distillations on one machine, kept: run folders, repetitions over seeds, searches."""
