"""The README's table of costs, from result files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADINGS = ("model", "new tokens", "plain, ms", "SmoothGuard : plain", "exact early stop : plain", "token level : plain", "naive loop : SmoothGuard", "noise + aggregation, %", "peak memory, MiB: plain / SmoothGuard")  # fmt: skip


def markdown(*results: Mapping[str, Any]) -> str:
    """One line a row of every result; "-" where a variant was not measured."""
    lines = [_HEADINGS, ("---",) * len(_HEADINGS)]
    for result in results:
        lines += [_cells(result["models"][row["model"]], row) for row in result["rows"]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


_PARTS = ("vision", "prefill", "decode", "noise", "aggregation", "rest")


def parts_markdown(*results: Mapping[str, Any]) -> str:
    """Where a defended answer's time goes, and when its first token comes: of every row that was looked into."""
    headings = ("model", "new tokens", *_PARTS, "first token, ms: plain", "answer level", "token level")
    lines: list[tuple[str, ...]] = [headings, ("---",) * len(headings)]
    for result in results:
        for row in result["rows"]:
            if "parts" not in row:
                continue
            shares = row["parts"]["smoothguard"]["shares"]
            first = row.get("first_token_seconds", {})
            waits = (
                _scaled(first[variant], 1000, ".0f") if variant in first else "-"
                for variant in ("plain", "smoothguard", "token")
            )
            cells = (_scaled(shares[part], 100, ".1f") for part in _PARTS)
            lines.append((result["models"][row["model"]]["about"], _tokens(row), *cells, *waits))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cells(model: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, ...]:
    exact = _ratio(row, "exact early stop : plain")
    if exact != "-":
        exact += f", {row['copies']['exact early stop']['num_samples_used']:.1f} copies"
    return (
        f"{model['about']}, {_count(model['parameters'])} parameters, {model['image_tokens']} image tokens",
        _tokens(row),
        _scaled(row["seconds"]["plain"], 1000, ".0f"),
        _ratio(row, "smoothguard : plain"),
        exact,
        _ratio(row, "token : plain"),
        _ratio(row, "naive loop : smoothguard"),
        _share(row),
        _memory(row),
    )


def _tokens(row: Mapping[str, Any]) -> str:
    if not row["forced"]:
        return f"as many as {row['requests']} take"
    return str(row["new_tokens"]) if row["sigma"] else f"{row['new_tokens']}, copies that agree (sigma 0)"


def _ratio(row: Mapping[str, Any], name: str) -> str:
    found = row["ratios"].get(name)
    return "-" if found is None else _scaled(found, 1, ".2f")


def _share(row: Mapping[str, Any]) -> str:
    shares = row.get("parts", {}).get("smoothguard", {}).get("shares")
    return "-" if shares is None else _scaled(shares["own"], 100, ".1f")


def _memory(row: Mapping[str, Any]) -> str:
    found = row.get("memory")
    if not found:
        return "-"
    return " / ".join(_scaled(found[variant], 2**-20, ".0f") for variant in ("plain", "smoothguard"))


def _scaled(found: Mapping[str, float], factor: float, form: str) -> str:
    """A value and its interval, in another unit; a single measurement has none."""
    value, low, high = (format(factor * found[name], form) for name in ("value", "low", "high"))
    return value if found["count"] == 1 else f"{value} ({low}-{high})"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
