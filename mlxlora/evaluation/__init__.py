"""How good a model is on a file of rows, and whether another is better."""
