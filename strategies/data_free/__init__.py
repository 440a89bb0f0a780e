"""No public data: class tables, prototypes."""
