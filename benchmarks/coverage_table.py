"""What becomes of a request to a model of every type that transformers maps to text from pictures or sounds.

.venv/bin/python benchmarks/coverage_table.py                 # benchmarks/results/coverage.json and docs/coverage.md: 20 minutes
.venv/bin/python benchmarks/coverage_table.py --only llava    # one type, printed

Every type is built at tiny size with random weights, real model and processor classes (`tests/tiny_models`); what is found is compared with separate calls of the undefended model. No figure of such a model is a result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "coverage.md"
PROBE = ROOT / "tests" / "tiny_models" / "probe.py"
SHARE = 6  # types a process: what it imports takes longer than a type
NOT_BUILT = {
    "fun_asr_nano": "its feature extractor needs torchaudio",
    "granite_speech": "its feature extractor needs torchaudio; `tests/test_sound_architectures.py` has it where there is one",
    "granite_speech_plus": "its feature extractor needs torchaudio",
    "mistral4": "the type maps to a model of text alone",
    "pi0": "gives actions, and has no `generate`: nothing of ours is called",
    "voxtral_realtime": "its processor needs mistral-common",
}
"""Types that are left out, and why."""
NOTES = {
    "vibevoice_asr": "compared with its own noise off (`sample=False`): it draws some in every call, so no two of them are alike",
}
"""What goes for a whole row."""
CHECKS = {
    "one": "one",
    "several": "several",
    "batch": "a batch",
    "noise": "noise",
    "gradient": "gradient",
    "attack": "attack",
}
HEAD = """# Coverage

{green} of the {total} model types that transformers {version} maps to text from pictures or sounds are defended throughout; {refused}
refuse every request; of the rest it is said below what is and what is not. None is undefended in silence.

`make coverage` makes this page again. Each type is built at tiny size with random weights, by its real model and processor
classes (`tests/tiny_models`); no figure of such a model is a result: what is shown is that the ways fit.

- **one, several, a batch**: every copy's answer is that of a separate, undefended call on its pixels, for one picture, two in
  one row, and three rows with pictures of unequal size, each of which answers as it does alone. A type that only hears gets sounds
  of unequal length instead, and a copy's separate call is on what the processor makes of the noisy waveforms. One that sees and
  hears is asked about pictures here.
- **noise**: a painted colour lies where the layout has its channels, every channel's noise is sigma / image_std within 5 %, and no
  two patches or tiles of a picture share their noise. Noise on a sound is noise on its waveform (`clips`), of which features are
  extracted again: its amplitude is audio_sigma within 5 %, no two copies share it, and the features are others.
- **gradient**: the model's first decision has a gradient at the tensor that `generate` is given: pixels, or features of sounds.
- **attack**: so has an answer's loss at every picture, through the processor, or at every waveform, through a differentiable copy
  of its feature extractor that gives the same features; not part of "defended throughout".

"""


def types() -> dict[str, str]:
    """Every type of the two mappings, and the name of its model class."""
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, Any] = {}
    for name in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
        found |= dict(getattr(auto, name, {}))
    return {kind: found[kind] if isinstance(found[kind], str) else found[kind][0] for kind in sorted(found)}


def probed(kinds: Sequence[str]) -> list[dict[str, Any]]:
    """What the probe says of each type, all of them in one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, str(PROBE), "--json", *kinds], capture_output=True, text=True, check=False, env=environment
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(found) < len(kinds):
        raise RuntimeError(f"{kinds[len(found)]}: {(done.stderr.strip().splitlines() or ['nothing said'])[-1]}")
    return found


def verdict(row: dict[str, Any]) -> str:
    """green, refused (every request), wrong, or partly."""
    if row["green"]:
        return "green"
    checks = row["checks"]
    if any(found.startswith("WRONG") for check, found in checks.items() if check != "attack"):
        return "wrong"
    asked = [checks[name] for name in ("one", "several", "batch")]
    return "refused" if all(found.startswith(("refused", "- ")) for found in asked) else "partly"


def page(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    rows = result["types"]
    count = {word: sum(row["verdict"] == word for row in rows.values()) for word in ("green", "refused")}
    lines = [
        HEAD.format(green=count["green"], refused=count["refused"], total=len(rows), version=result["transformers"])
    ]
    lines += ["| type | pixels or features | " + " | ".join(CHECKS.values()) + " |", "| --- " * (len(CHECKS) + 2) + "|"]
    notes: list[str] = []
    for kind, row in rows.items():
        if row["verdict"] == "not built":
            lines.append(f"| {kind} | not built | " + " | ".join("" for _ in CHECKS) + " |")
            notes.append(f"- **{kind}**: {row['why']}.")
            continue
        layout = f"`{row['key']}`, {row['layout']}" if row["key"] else "refused"
        marks = []
        for check in CHECKS:
            said = row["checks"].get(check, "")
            short = said.startswith("- fails upstream")
            marks.append("yes" if said == "yes" else "" if not said else "upstream fails" if short else "see below")
            if marks[-1] == "see below" and "refused" in said:
                marks[-1] = "refused"
        lines.append(f"| {kind} | {layout} | " + " | ".join(marks) + " |")
        if kind in NOTES:
            notes.append(f"- **{kind}**: {NOTES[kind]}.")
        if row["verdict"] == "refused":
            notes.append(f"- **{kind}**, every request: {row['checks']['one'][:400]}")
            continue
        told = {}
        for check in CHECKS:
            said = row["checks"].get(check, "yes")
            if said != "yes":
                told.setdefault(" ".join(said.removeprefix("- ").split()), []).append(CHECKS[check])
        notes += [f"- **{kind}**, {', '.join(which)}: {said[:400]}" for said, which in told.items()]
    return "\n".join([*lines, "", "## What is not a yes, in its own words", "", *notes, ""])


def main() -> int:
    """All types, or one; exits with 1 where anything is wrong."""
    from concurrent.futures import ThreadPoolExecutor

    import transformers
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one type: printed, nothing is written")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(probed([asked.only])[0], indent=1))
        return 0
    known = types()
    built = [kind for kind in known if kind not in NOT_BUILT]
    shares = [built[start : start + SHARE] for start in range(0, len(built), SHARE)]
    with ThreadPoolExecutor(asked.processes) as pool:
        told = itertools.chain.from_iterable(pool.map(probed, shares))
        found = dict(zip(built, tqdm(told, total=len(built), unit="type"), strict=True))
    rows = {}
    for kind, model in known.items():
        if kind in NOT_BUILT:
            rows[kind] = {"model": model, "verdict": "not built", "why": NOT_BUILT[kind]}
        else:
            rows[kind] = {**found[kind], "verdict": verdict(found[kind])}
    result = {
        "about": "every multimodal type of transformers at tiny size, random weights",
        "command": "make coverage",
        "transformers": transformers.__version__,
        "types": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))
    for word in ("green", "partly", "refused", "not built", "wrong"):
        print(f"{word}: {sum(row['verdict'] == word for row in rows.values())}")
    return int(any(row["verdict"] == "wrong" for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
