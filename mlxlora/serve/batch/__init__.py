"""Answers of many adapters decoded together: rows, slots, sampling, what is kept of prompts."""
