"""The verbs of the command line, a file each: options in, one library call, the result shown."""
