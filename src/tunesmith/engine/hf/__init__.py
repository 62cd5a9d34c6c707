"""Ways through transformers' own layers: side by side with padding, or along a tree, with what makes those faster."""
