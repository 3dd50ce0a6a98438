"""A model as transformers has it."""
