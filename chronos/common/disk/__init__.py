"""Bytes: files read, written and checked. Knows no expert and no model."""
