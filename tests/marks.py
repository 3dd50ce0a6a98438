"""Tokenizers with marks for thoughts and calls, and templates that use them."""

import json
from pathlib import Path
from typing import Any

from conftest import SPECIAL, write_tokenizer

from mlxlora.base import open_tokenizer

MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
VOCABULARY = 256 + len(SPECIAL) + len(MARKS)
# In the structure of Qwen3's: tools in front, calls and their answers as turns, thoughts dropped.
TOOLS = """{%- if tools %}<|im_start|>system
# Tools
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function %}
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
OPENED = TOOLS.replace("{% if enable_thinking is defined", "{% if x is defined").replace(
    "assistant\n{% if x", "assistant\n<think>\n{% if x"
)


def marked(directory: Path, template: str | None = TOOLS, marks=MARKS, special=False) -> Any:
    """mlx-lm's tokenizer, as a base has it; marks follow the byte tokenizer's special tokens."""
    write_tokenizer(directory, template)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, mark in enumerate(marks):
        token = {"id": 256 + len(SPECIAL) + number, "content": mark, "special": special}
        content["added_tokens"].append({**token, **flags})
    file.write_text(json.dumps(content))
    tokenizer = open_tokenizer(directory, {})
    tokenizer._vocabulary = 256 + len(SPECIAL) + len(marks)
    return tokenizer
