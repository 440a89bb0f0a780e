"""Rules of mutual learning: who learns what from whose predictions.

They know peers and rows, and nothing of how peers are trained: `fedkd distill` uses them in every
step of models on one machine, federations on what clients upload. Losses let gradients flow to the
peer that learns; what it is compared with is a constant, except where attention or a gate made it.
"""
