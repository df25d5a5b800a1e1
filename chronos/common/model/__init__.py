"""What a model is: its configuration, its geometry, the names and shapes of its weights."""
