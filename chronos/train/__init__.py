"""Training: the loop that every stage shares."""
