"""A directory for `ollama create`: a GGUF, and a Modelfile that renders chats right."""
