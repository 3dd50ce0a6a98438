"""Many adapters over one base: a batch that mixes them, and an OpenAI-compatible server."""
