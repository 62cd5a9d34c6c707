"""Base against tuned model: what is measured, and the verdict on it."""
