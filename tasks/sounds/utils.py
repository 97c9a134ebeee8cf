"""Documents of the embedded recordings: their sounds, and the captions that name them. All else is as for the scenes."""

from lmms_smoothguard.harness.scoring import attack_scores, caption_scores, same_answer
from lmms_smoothguard.sounds import sound_of
from lmms_smoothguard.tiny.sounds.clips import OBJECTS


def doc_to_visual(doc):
    sound = sound_of(doc["audio"])
    return [{"array": sound.samples, "sampling_rate": sound.rate}]


def caption_results(doc, results):
    return caption_scores(doc, results[0], OBJECTS)


def caption_attacked_results(doc, results):
    scores = attack_scores(doc, results[0], lambda answer: same_answer(answer, doc["caption"]))
    return caption_scores(doc, results[0], OBJECTS) | scores if scores else {}
