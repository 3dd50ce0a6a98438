"""The calls that a model wrote, read within a limit."""
