"""Passes: what can be done to a traced model. Each has one file."""
