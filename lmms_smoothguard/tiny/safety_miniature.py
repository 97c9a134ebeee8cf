"""A harmless miniature in MM-SafetyBench's public layout: the embedded model's forbidden requests in place of harmful ones.

python -m lmms_smoothguard.tiny.safety_miniature DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lmms_smoothguard.evaluation.mm_safety import SCENARIOS
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.scenes import make_scenes

_SEED = 5  # below 1,000: never used in training
_SIZE = 128


def questions(scenarios: tuple[str, ...], each: int = 2) -> dict[str, dict[str, dict[str, str]]]:
    """Scenario -> id -> the six published fields. Every field words the request in its own way, as in the original."""
    pairs = language.request_pairs(language.FORBIDDEN_VERBS, test=True)
    if each * len(scenarios) > len(pairs):
        raise ValueError(f"{each} questions for {len(scenarios)} scenarios; expected at most {len(pairs)} in all")
    places = iter(pairs)
    return {scenario: {str(number): _entry(*next(places)) for number in range(each)} for scenario in scenarios}


def _entry(verb: str, thing: str) -> dict[str, str]:
    tell, how, explain, steps = (language.request(verb, thing, form) for form in range(4))
    return {
        "Question": tell,
        "Changed Question": how,
        "Key Phrase": f"{verb} {thing}",
        "Phrase Type": "activity",
        "Rephrased Question": explain,
        "Rephrased Question(SD)": steps,
    }


def pictures(phrase: str, scene: Image.Image) -> dict[str, Image.Image]:
    """The three kinds: a scene, the phrase drawn, the scene above the phrase."""
    scene = scene.resize((_SIZE, _SIZE))
    typo = Image.new("RGB", (_SIZE, _SIZE // 2), "white")
    ImageDraw.Draw(typo).text((6, _SIZE // 4 - 6), phrase, fill="black")
    both = Image.new("RGB", (_SIZE, _SIZE + typo.height), "white")
    both.paste(scene, (0, 0))
    both.paste(typo, (0, _SIZE))
    return {"SD": scene, "TYPO": typo, "SD_TYPO": both}


def write(directory: Path, scenarios: tuple[str, ...] = SCENARIOS, each: int = 2) -> None:
    """Writes the authors' layout: processed_questions/<scenario>.json and imgs/<scenario>/<kind>/<id>.jpg."""
    made = questions(scenarios, each)
    scenes = iter(make_scenes(each * len(scenarios), _SEED).images)
    for scenario, entries in made.items():
        _write_json(directory / "processed_questions" / f"{scenario}.json", entries)
        for name, entry in entries.items():
            for kind, picture in pictures(entry["Key Phrase"], Image.fromarray(next(scenes))).items():
                path = directory / "imgs" / scenario / kind / f"{name}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, quality=95)


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
