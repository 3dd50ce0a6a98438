"""Several variants of a run, of which the hopeless are stopped early."""
