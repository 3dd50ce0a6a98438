import json

import pytest
from conftest import CHATML, write_tokenizer
from mlx_lm import utils as zoo

from mlxlora.base import open_tokenizer
from mlxlora.config import DataConfig
from mlxlora.data.formats import parse
from mlxlora.data.render import Renderer
from mlxlora.errors import DataError

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hé 🙂"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": " ho\n"},
    ]
}
# What Qwen3's template does: an empty thinking block in the last answer only.
THINKING = (
    "{% set last = messages | length - 1 %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 == last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What DeepSeek-R1's does: the prompt opens a thinking block that earlier turns lack.
OPENED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
REWRITES = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}(earlier){% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What Qwen3's does with thinking that the data brings: kept in the last answer only.
DROPS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{{ m.content }}"
    "{% else %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_EOS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def renderer(tmp_path, template=CHATML, **data):
    write_tokenizer(tmp_path, template)
    return Renderer(zoo.load_tokenizer(tmp_path), DataConfig(**data))


def trained(render: Renderer, row: dict) -> list[str]:
    """The runs of supervised tokens, as text."""
    example = render(parse(row, {}))
    runs, current = [], []
    for token, on in zip(example.tokens.tolist(), [*example.mask.tolist()], strict=True):
        if on:
            current.append(token)
        elif current:
            runs.append(current)
            current = []
    return [render.tokenizer.decode(run) for run in [*runs, current] if run]


def test_the_mask_of_a_conversation_token_by_token(tmp_path):
    render = renderer(tmp_path)
    example = render(parse(CONVERSATION, {}))
    text = (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhé 🙂<|im_end|>\n"
        "<|im_start|>assistant\nok<|im_end|>\n<|im_start|>user\nok<|im_end|>\n"
        "<|im_start|>assistant\n ho\n<|im_end|>\n"
    )
    start, end, stop = 257, 258, 10
    raw = lambda s: list(s.encode())  # noqa: E731
    byte = {b: render.tokenizer.convert_tokens_to_ids(c) for b, c in _byte_characters().items()}

    def said(role: str, words: str, train: bool) -> list[tuple[int, bool]]:
        head = [start, *(byte[b] for b in raw(f"{role}\n"))]
        body = [*(byte[b] for b in raw(words)), end]
        return [(t, False) for t in head] + [(t, train) for t in body] + [(byte[stop], False)]

    expected = [
        *said("system", "be kind", False),
        *said("user", "hé 🙂", False),
        *said("assistant", "ok", True),
        *said("user", "ok", False),
        *said("assistant", " ho\n", True),
    ]
    assert render.tokenizer.decode(example.tokens.tolist()) == text
    assert list(zip(example.tokens.tolist(), example.mask.tolist(), strict=True)) == expected


def _byte_characters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


def test_masks_by_option(tmp_path):
    assert trained(renderer(tmp_path), CONVERSATION) == ["ok<|im_end|>", " ho\n<|im_end|>"]
    last = renderer(tmp_path, mask="completion")
    assert trained(last, CONVERSATION) == [" ho\n<|im_end|>"]
    everything = renderer(tmp_path, mask="all")
    assert len(trained(everything, CONVERSATION)) == 1
    assert render_all(everything).mask.all()


def render_all(render):
    return render(parse(CONVERSATION, {}))


def test_what_is_trained_is_what_would_be_generated(tmp_path):
    """The tokens before the last trained span are the prompt that inference would use."""
    render = renderer(tmp_path)
    example = render(parse(CONVERSATION, {}))
    prompt = render.tokenizer.apply_chat_template(
        CONVERSATION["messages"][:-1], add_generation_prompt=True, tokenize=True
    )
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.mask[len(prompt) - 1]
    assert example.mask[len(prompt) : -1].all()


def test_a_thinking_block_added_to_the_last_answer_is_trained_and_others_are_found(tmp_path):
    assert trained(renderer(tmp_path, THINKING), CONVERSATION) == [
        "ok<|im_end|>",
        "<think>\n\n</think>\n\n ho\n<|im_end|>",
    ]


def test_a_prompt_that_opens_a_block_is_masked_right_and_reported(tmp_path):
    render = renderer(tmp_path, OPENED)
    assert trained(render, CONVERSATION) == ["ok<|im_end|>", " ho\n<|im_end|>"]
    assert len(render.notes) == 1
    assert "<think>" in render.notes[0]


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_reason(tmp_path):
    with pytest.raises(DataError, match=r"(differently once more follow|cannot be verified)"):
        trained(renderer(tmp_path, REWRITES), CONVERSATION)
    single = {"prompt": "hi", "completion": "ho"}
    assert trained(renderer(tmp_path, REWRITES), single) == ["ho<|im_end|>"]


def test_a_template_without_end_tokens_ends_turns_where_the_next_begins(tmp_path):
    row = {"messages": CONVERSATION["messages"][1:]}
    assert trained(renderer(tmp_path, NO_EOS), row) == ["ok\n", " ho\n\n"]


def test_plain_text_is_closed_by_an_end_token(tmp_path):
    example = renderer(tmp_path)(parse({"text": "abc"}, {}))
    assert example.tokens[-1] == 258
    assert example.mask.all()


def test_without_a_template_pairs_are_joined_and_chats_refused(tmp_path):
    render = renderer(tmp_path, None)
    assert trained(render, {"prompt": "hi ", "completion": "ho"}) == ["ho<|im_end|>"]
    with pytest.raises(DataError, match="no chat template"):
        render(parse(CONVERSATION, {}))


def test_long_rows_are_cut_and_say_so(tmp_path):
    render = renderer(tmp_path, max_length=10)
    example = render(parse({"prompt": "x" * 50, "completion": "y"}, {}))
    assert example.truncated
    assert len(example.tokens) == 11
    assert example.supervised == 0


def test_text_that_imitates_a_turn_does_not_move_the_mask(tmp_path):
    row = {"prompt": "ho<|im_end|>", "completion": "ho"}
    assert trained(renderer(tmp_path), row) == ["ho<|im_end|>"]


def test_a_slow_tokenizer_is_rendered_in_pieces_or_refused(tmp_path):
    render = renderer(tmp_path)
    fast = render(parse(CONVERSATION, {}))

    class Slow:
        is_fast = False

        def __init__(self, plain):
            self.plain = plain

        def encode(self, text, add_special_tokens=True):
            return self.plain.encode(text, add_special_tokens=add_special_tokens)

    render._plain = Slow(render._plain)
    slow = render(parse(CONVERSATION, {}))
    assert slow.tokens.tolist() == fast.tokens.tolist()
    assert slow.mask.tolist() == fast.mask.tolist()


def test_the_token_that_closes_a_turn_is_a_stop_token(tmp_path):
    """Base models often name only <|endoftext|> as their end."""
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = "<|endoftext|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert zoo.load_tokenizer(tmp_path).eos_token_ids == {256}
    tokenizer = open_tokenizer(tmp_path, {})
    assert tokenizer.eos_token_ids == {256, 258}
    assert trained(Renderer(tokenizer, DataConfig()), CONVERSATION)[0] == "ok<|im_end|>"


def test_a_template_that_never_says_stop_is_noted(tmp_path):
    render = renderer(tmp_path, NO_EOS)
    trained(render, CONVERSATION)
    assert any("where to stop" in note for note in render.notes)


def test_turns_whose_thinking_the_template_drops_are_not_trained(tmp_path):
    render = renderer(tmp_path, DROPS)
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nfirst\n</think>\n\na1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "<think>\nsecond\n</think>\n\na2"},
    ]
    assert trained(render, {"messages": messages}) == ["<think>\nsecond\n</think>\n\na2<|im_end|>"]
    assert any("drops the thinking" in note for note in render.notes)


@pytest.mark.parametrize("content", ["a", "s", "", "assistant"])
def test_a_conversation_may_begin_with_the_assistant(tmp_path, content):
    row = {"messages": [{"role": "assistant", "content": content}]}
    assert trained(renderer(tmp_path), row) == [content + "<|im_end|>"]


def test_a_system_prompt_without_a_template_joins_the_prompt(tmp_path):
    row = {"prompt": "p", "completion": "c", "system": "s"}
    render = renderer(tmp_path, None)
    example = render(parse(row, {}))
    assert render.tokenizer.decode(example.tokens.tolist()) == "s\n\npc<|im_end|>"
