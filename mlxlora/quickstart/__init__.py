"""The bundled tiny base, its sample task, and the story that shows both.

base/ is a small Qwen3-shaped model at 4 bits, trained from scratch by recipes/tiny-base on
text the project generates itself. data/ holds the sample task: plain English requests and
the strict JSON commands they mean. The base has never seen such a command.
"""
