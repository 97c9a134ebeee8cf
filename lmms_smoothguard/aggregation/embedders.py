"""Embedders: texts to vectors, (n, width) float arrays.

The default is lexical: sentence embedders cluster by topic, not by polarity ("Yes, there is" and "No, there is not"
have a cosine of .91), and a safety verdict hangs on polarity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmms_smoothguard import plugins
from lmms_smoothguard.errors import ConfigError, did_you_mean

Embed = Callable[[Sequence[str]], np.ndarray]


class EmbedderContext(NamedTuple):
    """What an embedder may draw on: the name as the user wrote it, and the defended model and its tokenizer, if any."""

    name: str = "lexical"
    model: Any = None
    tokenizer: Any = None


def load_embedder(context: EmbedderContext) -> Embed:
    """The embedder of that name: registered, a directory, or `sentence-transformers/<id>`. Raises ConfigError."""
    name = context.name
    known = plugins.offers("embedders")
    if name not in known and (name.startswith("sentence-transformers/") or Path(name).is_dir()):
        return sentence_transformer(context)
    if name not in known:
        raise ConfigError(
            f"unknown embedder {name!r}; {did_you_mean(name, known)}, sentence-transformers/<id>, or a directory"
        )
    with plugins.blame("embedders", name):
        embed = plugins.load("embedders", name)(context)

    def checked(texts: Sequence[str]) -> np.ndarray:
        with plugins.blame("embedders", name):
            vectors = np.asarray(embed(texts), dtype=float)
            if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
                raise ConfigError(
                    f"embedder {name!r} gave an array of shape {vectors.shape} for {len(texts)} texts; expected one finite "
                    "vector a text"
                )
        return vectors

    return checked


def lexical(context: EmbedderContext) -> Embed:
    """Character n-gram TF-IDF over the answers at hand; nothing to download."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        from sklearn.feature_extraction.text import TfidfVectorizer

        # A space on either side keeps an empty answer from having no n-gram at all.
        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), sublinear_tf=True)
        return vectorizer.fit_transform([text or "∅" for text in texts]).toarray()

    return embed


def sentence_transformer(context: EmbedderContext) -> Embed:
    """Any sentence-transformers model, by id or directory; needs the extra `embedders`."""
    model = _sentence_transformer(context.name)
    return lambda texts: np.asarray(model.encode(list(texts), show_progress_bar=False))


@functools.lru_cache(maxsize=4)
def _sentence_transformer(name: str) -> Any:
    if name == "sentence-transformers":
        raise ConfigError("embedder 'sentence-transformers' names no model; expected sentence-transformers/<id>")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            f"embedder {name!r} needs sentence-transformers; pip install 'lmms-smoothguard[embedders]'"
        ) from error
    return SentenceTransformer(name)


def roberta(context: EmbedderContext) -> Embed:
    """RoBERTa-base, mean-pooled over at most 128 tokens: the paper's embedder."""
    from transformers import AutoModel, AutoTokenizer

    return mean_pooled(_pretrained(AutoModel, context.name), _pretrained(AutoTokenizer, context.name))


@functools.lru_cache(maxsize=4)
def _pretrained(auto_class: Any, name: str) -> Any:
    return auto_class.from_pretrained(name)


def mean_pooled(model: Any, tokenizer: Any, max_tokens: int = 128) -> Embed:
    """The mean of the last hidden state over the tokens of each text."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        import torch

        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        with torch.no_grad():
            hidden = model.eval()(**batch.to(model.device)).last_hidden_state.float()
        mask = batch["attention_mask"][..., None].to(hidden.device, hidden.dtype)
        return ((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()

    return embed


def model_embeddings(context: EmbedderContext) -> Embed:
    """The mean of the defended model's own input embeddings over an answer's tokens."""
    if context.model is None or context.tokenizer is None:
        raise ConfigError(
            "embedder 'model' needs the defended model and its tokenizer; "
            "call hf_integration.attach(model, processor), or use embedder='lexical'"
        )
    table, tokenizer = context.model.get_input_embeddings(), context.tokenizer

    def embed(texts: Sequence[str]) -> np.ndarray:
        import torch

        vectors = []
        for text in texts:
            ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)
            with torch.no_grad():
                found = table(ids.to(table.weight.device)).float()
            vectors.append(found.mean(0).cpu().numpy() if len(ids) else np.zeros(found.shape[-1], np.float32))
        return np.stack(vectors)

    return embed
