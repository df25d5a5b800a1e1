"""Models that MLX-LM builds, with their routed experts streamed by Chronos."""
