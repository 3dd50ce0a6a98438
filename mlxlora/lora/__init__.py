"""The low-rank layers, attaching them, and the adapter as a value on disk."""
