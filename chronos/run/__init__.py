"""Answering: a model, opened, takes prompts and gives tokens, text and numbers."""
