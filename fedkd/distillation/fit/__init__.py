"""Training: loops of one model and of several, what they are fed, where models are built."""
