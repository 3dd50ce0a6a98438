"""Chat templates written here, each in the structure of a family that is well known."""

import json
from dataclasses import dataclass
from pathlib import Path

from conftest import write_tokenizer
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from mlxlora.base import open_tokenizer

QWEN_DEFAULT = "You are a helpful model made of weights."


@dataclass(frozen=True)
class Family:
    template: str
    special: tuple[str, ...]
    eos: str
    bos: str = ""
    added: bool = True  # the tokenizer puts bos in front by itself


CHATML = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
CHATML_DEFAULT = (
    "{%- if messages[0].role != 'system' -%}<|im_start|>system\n"
    + QWEN_DEFAULT
    + "<|im_end|>\n{% endif -%}"
    + CHATML
)
THINKING = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role == 'system' -%}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- set words = m.content -%}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if '</think>' in words and m.role == 'assistant' -%}
{%- set thought = words.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set words = words.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}<|im_start|>{{ m.role }}
{{ words }}<|im_end|>
{% elif m.role == 'assistant' -%}<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thought) -%}<think>
{{ thought.strip('\\n') }}
</think>

{{ words.lstrip('\\n') }}{%- else -%}{{ words }}{%- endif -%}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}<think>

</think>

{% endif -%}{%- endif -%}"""
REASONER = (  # the answer always begins with its thinking
    "{{ '<|begin|>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SWITCHED = """[start]{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set off = enable_thinking is defined and not enable_thinking -%}
{%- for m in messages -%}<|{{ m.role }}|>{{ '\\n' }}
{%- if m.role == 'assistant' -%}
{{- '<think>' + (m.reasoning_content or '' if loop.index0 > ns.last else '') + '</think>\\n' }}
{{- m.content.strip() }}
{%- else -%}{{ m.content }}{{ '/nothink' if off and m.role == 'user' else '' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
{{- '\\n<think></think>' if off else '' }}{%- endif -%}"""
LLAMA3 = (
    "{% for m in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + m.role"
    " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA3_DATED = """{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set told = '' %}
{%- if messages[0].role == 'system' %}{%- set told = messages[0].content | trim %}
{%- set messages = messages[1:] %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge: 2023\\nToday: ' + date + '\\n\\n' }}
{{- told + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
STRICT = """{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must take turns') }}{%- endif -%}{%- endfor -%}"""
SPLIT = """{%- if messages[0].role == 'system' -%}{%- set told = messages[0].content -%}
{%- set turns = messages[1:] -%}{%- else -%}{%- set told = none -%}{%- set turns = messages -%}
{%- endif -%}"""
LLAMA2 = (
    SPLIT
    + STRICT
    + """{%- for m in turns -%}
{%- if loop.first and told is not none -%}
{%- set words = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' + m.content -%}
{%- else -%}{%- set words = m.content -%}{%- endif -%}
{%- if m.role == 'user' -%}{{ bos_token + '[INST] ' + words.strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + words.strip() + ' ' + eos_token }}{%- endif -%}{%- endfor -%}"""
)
MISTRAL = (
    SPLIT
    + "{{ bos_token }}"
    + STRICT
    + """{%- for m in turns -%}{%- if m.role == 'user' -%}
{{ '[INST] ' + (told + '\\n\\n' if loop.first and told else '') + m.content + '[/INST]' }}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}{%- endfor -%}"""
)
MISTRAL_LAST = MISTRAL.replace("loop.first and told", "loop.last and told")
GEMMA = (
    SPLIT
    + "{{ bos_token }}"
    + STRICT
    + """{%- for m in turns -%}
{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (told + '\\n\\n' if loop.first and told else '') + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
)
GEMMA_STRICT = GEMMA.replace(
    SPLIT,
    "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}"
    "{%- set turns = messages -%}{%- set told = none -%}",
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
AWKWARD = (  # braces, quotes and characters that a Modelfile cannot hold as they are
    '{% for m in messages %}{{ \'{{"""\n<\u00a0\u200b\U0001f600|\' + m.role + "{" }}'
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
    '{{ \'{{"""\n<\u00a0\u200b\U0001f600|assistant{\' }}{% endif %}'
)
SHOUTING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | upper }}<|end|>{% endfor %}"
COUNTING = (  # every turn has a number, which fixed texts do not
    "{% for m in messages %}<|turn {{ loop.index }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn {{ messages | length + 1 }}|>{% endif %}"
)
TWICE = "{% for m in messages %}{{ m.content }}<|end|>{{ m.content }}{% endfor %}"

IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
GG = ("<start_of_turn>", "<end_of_turn>", "<eos>")
FAMILIES = {
    "chatml": Family(CHATML, IM, "<|im_end|>"),
    "chatml, default system": Family(CHATML_DEFAULT, IM, "<|im_end|>"),
    "chatml, thinking": Family(THINKING, (*IM, "<think>", "</think>"), "<|im_end|>"),
    "always thinking": Family(
        REASONER, ("<|User|>", "<|Assistant|>", "<|end|>", "<think>", "</think>"), "<|end|>",
        "<|begin|>",
    ),
    "thinking, switched by the question": Family(
        SWITCHED, ("<|user|>", "<|assistant|>", "<think>", "</think>"), "<|user|>"
    ),
    "llama 3": Family(LLAMA3, LL, "<|end_of_text|>", "<|begin_of_text|>"),
    "llama 3, dated": Family(LLAMA3_DATED, LL, "<|end_of_text|>", "<|begin_of_text|>"),
    "llama 2": Family(LLAMA2, ("</s>",), "</s>", "<s>"),
    "llama 2, bos not added": Family(LLAMA2, ("</s>",), "</s>", "<s>", added=False),
    "mistral": Family(MISTRAL, ("</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "mistral, system last": Family(MISTRAL_LAST, ("</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "gemma": Family(GEMMA, GG, "<eos>", "<bos>"),
    "gemma, no system": Family(GEMMA_STRICT, GG, "<eos>", "<bos>"),
    "phi 3": Family(PHI3, ("<|end|>", "<|endoftext|>"), "<|endoftext|>", "<s>"),
    "zephyr": Family(ZEPHYR, ("</s>",), "</s>", "<s>"),
    "awkward": Family(AWKWARD, ("<|end|>",), "<|end|>"),
}  # fmt: skip
IMPOSSIBLE = {
    "shouting": Family(SHOUTING, ("<|end|>",), "<|end|>"),
    "twice": Family(TWICE, ("<|end|>",), "<|end|>"),
}


def write_family(directory: Path, family: Family) -> Path:
    """The family's tokenizer of bytes in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, family.template)
    file = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    names = [*family.special, *([family.bos] if family.bos else [])]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["eos_token"] = family.eos
    if family.bos:
        config["bos_token"] = family.bos
        if family.added:
            number = tokenizer.token_to_id(family.bos)
            tokenizer.post_processor = TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=[(family.bos, number)]
            )
    tokenizer.save(str(file))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def tokenizer_of(directory: Path, family: Family):
    return open_tokenizer(write_family(directory, family), {})
