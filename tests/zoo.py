"""A few families that between them have everything in a head, a mask or a cache that varies."""

from architectures import model_of

__all__ = ["FAMILIES", "model_of"]

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "olmo2",
    "gemma2",  # soft-capped logits and scores
    "gemma3_text",
    "cohere",  # scaled logits
    "cohere2",
    "granite",
    "minicpm",
    "phi3",
    "phi",  # a bias in the head
    "gpt_oss",  # attention sinks, windows, experts
    "deepseek_v2",  # keys and values of different sizes, from one latent
    "gpt2",  # absolute positions
    "mamba",  # recurrent
)
