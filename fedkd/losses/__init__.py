"""Pure functions of tensors: what a student pays for differing from its targets."""
