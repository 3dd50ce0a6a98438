"""A run told to the trackers of others while it goes; each is an extra to install."""
