"""A run, or several side by side, as one HTML page that asks nothing of any host."""
