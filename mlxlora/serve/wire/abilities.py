"""What a model can be asked for, as its tokenizer and its chat template tell."""

from typing import Any

from transformers import PreTrainedTokenizerFast

from mlxlora.serve.grammar.texts import Thinking


def thinking_of(tokenizer: Any, tokens: list[int]) -> Thinking:
    """Whether an answer to this prompt goes on thinking, may begin to, or is past it.

    Only what stands at the very end counts: marks elsewhere are words of somebody.
    """
    if not tokenizer.has_thinking:
        return "no"
    ends: tuple[tuple[Thinking, int, Any], ...] = (
        ("open", tokenizer.rfind_think_start(tokens), tokenizer.think_start_tokens),
        ("no", tokenizer.rfind_think_end(tokens), tokenizer.think_end_tokens),
    )
    for thinking, at, mark in ends:
        if at >= 0 and not tokenizer.decode(tokens[at + len(mark) :]).strip():
            return thinking
    return "possible"


def knows_tools(tokenizer: Any) -> bool:
    """Whether the chat template tells the model of tools."""
    turns = [{"role": "user", "content": "hi"}]
    function = {"name": "probe", "description": "", "parameters": {"type": "object"}}
    try:
        without, told = (
            tokenizer.apply_chat_template(
                turns, tools=tools, add_generation_prompt=True, tokenize=False
            )
            for tools in (None, [{"type": "function", "function": function}])
        )
    except Exception:  # templates raise through jinja whatever they like
        return False
    return bool(without != told)


def capabilities(tokenizer: Any) -> list[str]:
    """What can be asked of a model with this tokenizer, as /v1/models tells it."""
    chats = bool(tokenizer.has_chat_template)
    found = {
        "completions": True,
        "chat": chats,
        "tools": chats and knows_tools(tokenizer),
        "reasoning": chats and bool(tokenizer.has_thinking),
        "json": isinstance(tokenizer._tokenizer, PreTrainedTokenizerFast),
    }
    return [name for name, holds in found.items() if holds]
