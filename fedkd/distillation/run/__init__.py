"""A whole distillation, from settings to finished models; search, checks and the list of parts."""
