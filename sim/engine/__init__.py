"""The engine: what carries out the calls of a round, on Ray workers or in this process."""
