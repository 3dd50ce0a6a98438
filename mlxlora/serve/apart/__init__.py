"""Work that may have to be ended, in processes of its own."""
