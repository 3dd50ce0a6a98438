"""The engine behind HTTP: who may ask, paths, streams, the socket."""
