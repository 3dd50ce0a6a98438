import mlx.core as mx
import pytest
from conftest import randomized
from memory import held
from mlx.utils import tree_flatten
from zoo import FAMILIES, model_of

from mlxlora.config import LoraConfig
from mlxlora.lora.attach import detach
from mlxlora.lora.fresh import new_layers, prepare_full
from mlxlora.train.forward import Forward
from mlxlora.train.thin import kinds_of_blocks, made_up, thin, words_of, zeros

TOKENS = mx.array([[3, 5, 7, 11, 13, 17]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_allows_what_the_model_allows(family):
    model = model_of(family)
    whole = Forward(model)
    with thin(model, model.layers[:2], 64, made_up):
        tried = Forward(model)
    assert (tried.head is None) == (whole.head is None)
    assert tried.packs == whole.packs
    if whole.head is not None:
        assert tried.head.path == whole.head.path
        assert (tried.head.scale, tried.head.cap) == pytest.approx(
            (whole.head.scale, whole.head.cap), rel=1e-4
        )


@pytest.mark.parametrize("fill", [None, zeros, made_up])
def test_the_model_is_itself_again(fill):
    model = model_of("qwen3", num_hidden_layers=4, tie_word_embeddings=False)
    new_layers(model, LoraConfig(rank=4), 0)
    randomized(model)
    before, logits = dict(tree_flatten(model.parameters())), model(TOKENS)
    with thin(model, model.layers[1:2], 50, fill):
        assert model(TOKENS).shape == (1, 6, 50)
        assert len(model.layers) == 1
        model.update(model.trainable_parameters())
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(after[name] is array for name, array in before.items())
    assert mx.array_equal(model(TOKENS), logits)


def test_made_up_weights_take_no_memory_and_differ_from_row_to_row():
    shape = mx.zeros((512, 4096))
    mx.eval(shape)
    before = held()
    weight = made_up(shape)
    mx.eval(weight)
    assert held() - before < 100_000
    assert not mx.array_equal(weight[0], weight[1])


def test_blocks_of_different_sizes_are_different_kinds():
    model = model_of("llama", num_hidden_layers=6)
    pattern = {"model.layers.2.*": 8, "model.layers.3.*": 8}
    new_layers(model, LoraConfig(rank=4, blocks=(1, 2, 3, 4, 5), rank_pattern=pattern), 0)
    assert [len(kind) for kind in kinds_of_blocks(model)] == [3, 2]
    detach(model)
    prepare_full(model)
    assert [len(kind) for kind in kinds_of_blocks(model)] == [6]


def test_words_are_those_of_the_embedding():
    assert words_of(model_of("qwen3")) == 200


def test_an_adapter_over_the_embedding_keeps_all_of_it():
    model = model_of("qwen3", tie_word_embeddings=True)
    new_layers(model, LoraConfig(rank=4, targets=("embed_tokens",)), 0)
    with thin(model, model.layers[:1], 50):
        assert model(TOKENS).shape == (1, 6, 200)
