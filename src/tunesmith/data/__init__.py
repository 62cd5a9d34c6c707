"""Rows: read, rendered in a model's template to token ids with what is learned of them, and kept."""
