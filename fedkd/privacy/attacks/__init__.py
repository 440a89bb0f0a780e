"""The mathematics of attacks on what a federation shows: pure functions of what an attacker saw."""
