"""Out of the tool: tables, figures, methods, references and one archive of a finished study."""
