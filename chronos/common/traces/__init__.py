"""The laboratory: recorded routing, and what caches and forecasters are worth on it."""
