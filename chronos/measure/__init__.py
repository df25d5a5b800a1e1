"""Measuring: speed by budget, loss and routing of a model, decode on recorded routing."""
