"""Which experts a model asks for: recorded traces and the plan of what to load next."""
