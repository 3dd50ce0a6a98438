"""This machine's training and decoding speed, beside mlx-lm's: mlxlora bench."""
