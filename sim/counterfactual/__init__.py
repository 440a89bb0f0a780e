"""What would have been: a run repeated with one thing otherwise; what clients are worth."""
