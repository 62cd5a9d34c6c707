"""A decoder and its backward pass, written by hand for a CPU."""
