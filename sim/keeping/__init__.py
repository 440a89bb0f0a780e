"""What is kept of a run: its folder, checkpoints, what it was made of; going on from there."""
