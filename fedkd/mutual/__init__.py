"""Rules of mutual learning: who learns what from whose predictions."""
