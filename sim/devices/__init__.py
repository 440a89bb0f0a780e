"""What clients are beside their data: how fast, how well connected, when they are there."""
