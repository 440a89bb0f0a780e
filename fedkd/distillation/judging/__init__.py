"""What finished models are worth: scores, diagnostics, figures."""
