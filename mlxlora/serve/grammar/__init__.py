"""Answers held to a grammar, which a process of its own follows."""
