"""Chronos inside other libraries."""
