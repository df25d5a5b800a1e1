"""Tools for tests, shipped for authors of backends: tiny models, oracles, faults, fakes."""
