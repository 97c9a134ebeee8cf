"""`smoothguard train tiny-guard`: about a minute on one core, bit by bit the same on one machine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.tiny.guard_lessons import CATEGORIES, Lesson, lessons
from lmms_smoothguard.tiny.guard_model import build_model, build_tokenizer, prompt, verdict_text

if TYPE_CHECKING:
    import torch

_IGNORED = -100
_HELD_OUT = 1000


@dataclasses.dataclass(frozen=True)
class GuardRecipe:
    """Everything that decides the weights, given the versions of torch and of the machine's arithmetic."""

    seed: int = 0
    steps: int = 500
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05


def train(
    out: Path, recipe: GuardRecipe, say: Callable[[str], None] = lambda text: None, held_out: int = _HELD_OUT
) -> dict[str, Rate]:
    """Trains from the recipe's seed into `out`: weights (safetensors), tokenizer, model card, figures on `held_out` exchanges."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums split by threads differ in their last bits
    try:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, recipe.seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
        )
        model.train()
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                warm, done = min(1.0, (step + 1) / 50), step / recipe.steps
                group["lr"] = recipe.lr * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
            batch = lessons(recipe.batch, 1000 * (recipe.seed + 1) + step, test=False)
            loss = _loss(model, tokenizer, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 100 == 0 or step + 1 == recipe.steps:
                say(f"step {step + 1} of {recipe.steps}, loss {loss.item():.4f}")
        out.mkdir(parents=True, exist_ok=True)
        model.eval().save_pretrained(out)
        tokenizer.save_pretrained(out)
        figures = held_out_figures(out, held_out)
    finally:
        torch.set_num_threads(threads)
    write_card(out, recipe, sum(parameter.numel() for parameter in model.parameters()), figures)
    return figures


def _loss(model: Any, tokenizer: Any, batch: list[Lesson]) -> torch.Tensor:
    """Cross-entropy of the verdict's tokens alone, over exchanges padded on the right."""
    import torch

    rows, targets = [], []
    for item in batch:
        asked = tokenizer(prompt(tokenizer, item), add_special_tokens=False).input_ids
        said = [*tokenizer(verdict_text(item.category), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append(asked + said)
        targets.append([_IGNORED] * len(asked) + said)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [_IGNORED] * (longest - len(row)) for row in targets])
    # Causal attention never looks right, so that padding needs no mask.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    known = wanted != _IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[known]), wanted[known])


def held_out_figures(directory: Path, count: int = _HELD_OUT) -> dict[str, Rate]:
    """Every figure of the model card: how often the guard judge is right on exchanges whose pairs training never saw."""
    from lmms_smoothguard.judges import Exchange
    from lmms_smoothguard.judges.guard import GuardJudge

    made = lessons(count, 0, test=True)
    found = GuardJudge(f"{directory}?device=cpu&batch_size=50").judge_batch(
        [Exchange(i.question, i.answer) for i in made]
    )
    right = [
        j.safe is (item.category is None) and j.verdict in ("safe", "unsafe")
        for item, j in zip(made, found, strict=True)
    ]
    unsafe = [place for place, item in enumerate(made) if item.category is not None]
    figures = {
        "verdict": rate(right),
        "unsafe found": rate(right[place] for place in unsafe),
        "safe passed": rate(right[place] for place in range(count) if made[place].category is None),
        "category of unsafe": rate(found[place].category == made[place].category for place in unsafe),
    }
    for kind in dict.fromkeys(item.kind for item in made):
        figures[f"verdict, {kind}"] = rate(ok for ok, item in zip(right, made, strict=True) if item.kind == kind)
    return figures


def write_card(target: Path, recipe: GuardRecipe, parameters: int, figures: dict[str, Rate]) -> None:
    """Writes `README.md` (the model card) and `figures.json` beside the weights."""
    command = f"smoothguard train tiny-guard --seed {recipe.seed}"
    record = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "parameters": parameters,
        "figures": {name: value.figure().to_dict() for name, value in figures.items()},
    }
    (target / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    harms = "\n".join(f"| {code} | {name} | {', '.join(verbs)} |" for code, (name, verbs) in CATEGORIES.items())
    (target / "README.md").write_text(
        _CARD.format(command=command, parameters=parameters / 1e6, table=table, harms=harms, recipe=recipe)
    )


_CARD = """\
---
license: apache-2.0
pipeline_tag: text-generation
library_name: transformers
---

# tiny-guard

A real `LlamaForCausalLM` with {parameters:.2f} M parameters, trained from nothing, that judges answers in the little language of
the embedded tiny-llava as LlamaGuard judges English: its chat template takes a user's and an assistant's turn, and it says
`safe`, or `unsafe` and a category. It is there so that `judge=guard/<directory>` can be tried and tested without a download.
It knows nothing of real harm: **do not judge another model with it.**

    {command}

trains it from its seed, on one core; the same machine gives the same weights bit by bit, another one weights of the same quality.

## What is unsafe

An answer that opens an explanation of a forbidden verb, or opens one and breaks off before any verb while a forbidden one was
asked for. Everything else is safe: refusals, explanations of permitted verbs whatever was asked, captions, Yes and No, word
salad. All of it is harmless by construction: nothing that it reads carries instructions.

| category | name | verbs |
|---|---|---|
{harms}

## Held-out figures

Shares with Wilson 95 % intervals, through the `guard` judge; every (verb, thing) pair in them is one that training never saw.

| figure | share |
|---|---|
{table}

{recipe.steps} steps of {recipe.batch} fresh exchanges, AdamW, peak learning rate {recipe.lr:g}, cosine decay.
"""
