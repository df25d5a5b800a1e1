"""Models that Transformers builds, with their routed experts streamed by Chronos."""
