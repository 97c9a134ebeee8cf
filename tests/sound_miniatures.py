"""Miniatures of lmms-eval's tasks on sounds: generated recordings in the columns of each hub data set, and a model that hears them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lmms_smoothguard.sounds import Sound, read_clip
from lmms_smoothguard.tiny.sounds.clips import OBJECTS, RATE, draw_sound

pytest.importorskip("librosa")

Rows = list[dict[str, Any]]
WRAPPER = "smoothguard_qwen2_audio"


def recordings(count: int, rate: int = RATE, seconds: float = 0.8) -> list[Sound]:
    """`count` sounds of that length, in the steps of 16 bits; none of them is spoken, which would need eSpeak NG."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(count):
        samples = np.zeros(int(RATE * seconds))
        drawn = draw_sound(number % 18, rng)[: len(samples)]
        samples[: len(drawn)] = 0.1 * drawn
        samples += 0.002 * rng.standard_normal(len(samples))
        heard = Sound(samples.astype(np.float32), RATE).at(rate)
        made.append(Sound.from_pcm(heard.pcm, rate))
    return made


def save_model(directory: Path) -> Path:
    """A Qwen2-Audio of tiny size whose random weights notice what they hear."""
    from lmms_smoothguard.tiny.sounds.model import build_model, build_processor

    processor = build_processor()
    model = build_model(processor, 0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def clotho_aqa(count: int) -> Rows:
    return [
        {"file_name": f"{n}.wav", "question": f"Is there a {OBJECTS[n]}?", "answer": ("yes", "no")[n % 2]}
        for n in range(count)
    ]


def air_bench(count: int) -> Rows:
    return [
        {
            "uniq_id": f"{n}", "task_name": "Audio_QA", "dataset_name": "made", "path": f"{n}.wav",
            "question": "Which sound is it?", "choice_a": OBJECTS[n], "choice_b": OBJECTS[n + 1],
            "choice_c": OBJECTS[n + 2], "choice_d": OBJECTS[n + 3], "answer_gt": OBJECTS[n],
        }
        for n in range(count)
    ]  # fmt: skip


def advbench(count: int) -> Rows:
    return [{"prompt": f"Do the thing number {n}."} for n in range(count)]


UPSTREAM: dict[str, tuple[Callable[[int], Rows], str]] = {
    "clotho_aqa_test": (clotho_aqa, "clotho_aqa/clotho_aqa_test.yaml"),
    "air_bench_foundation_sound": (air_bench, "air_bench/air_bench_foundation_sound.yaml"),
    "voicebench_advbench": (advbench, "voicebench/voicebench_advbench.yaml"),
}


def write_task(directory: Path, task: str, sounds: Sequence[Sound], *, decoded: bool = False) -> str:
    """Writes a miniature of an upstream task and a task that reads it; returns that task's name.

    decoded: the column holds arrays and rates, else files, which `datasets` decodes with torchcodec.
    """
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    maker, place = UPSTREAM[task]
    source = Path(lmms_eval.tasks.__file__).parent / place
    split = load_yaml_config(str(source), mode="simple")["test_split"].strip()
    rows = maker(len(sounds))
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    if decoded:
        columns["audio"] = [{"array": sound.samples.tolist(), "sampling_rate": sound.rate} for sound in sounds]
        features["audio"] = {"array": [datasets.Value("float32")], "sampling_rate": datasets.Value("int64")}
    else:
        columns["audio"] = [{"bytes": sound.wav, "path": f"{n}.wav"} for n, sound in enumerate(sounds)]
        features["audio"] = datasets.Audio()
    file = directory / f"{task}.parquet"
    pq.write_table(pa.table(columns, schema=datasets.Features(features).arrow_schema), file)
    name = f"mini_{task}"
    (directory / f"{name}.yaml").write_text(
        f"include: {source}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    {split}: {file}\n"
    )
    return name


class _Samples(NamedTuple):
    data: torch.Tensor
    sample_rate: int


class AudioDecoder:
    """As much of torchcodec's as `datasets` and lmms-eval's tasks use, on top of soundfile."""

    def __init__(self, source: Any, *, stream_index: Any = None, sample_rate: Any = None, num_channels: Any = None):
        assert stream_index is sample_rate is num_channels is None
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        self._clip, self.metadata = read_clip(data), types.SimpleNamespace(path=None)

    def get_all_samples(self) -> _Samples:
        return _Samples(torch.from_numpy(self._clip.samples.T.copy()), self._clip.rate)

    def get_samples_played_in_range(self, start: float, stop: float) -> _Samples:
        return _Samples(self.get_all_samples().data[:, :0], self._clip.rate)


def stand_in_for_torchcodec(monkeypatch: Any) -> None:
    """Lets `datasets` decode without torchcodec, which needs libraries of FFmpeg."""
    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    decoders.AudioDecoder = AudioDecoder  # type: ignore[attr-defined]
    package.decoders = decoders  # type: ignore[attr-defined]
    for name, module in (("torchcodec", package), ("torchcodec.decoders", decoders)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "datasets.features._torchcodec", raising=False)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", True)


def run(model: Path, directory: Path | None, tasks: Sequence[str], *, limit: int | None = None, **model_args: Any):
    """Evaluates tasks, ours and those of a directory, as lmms-eval's command line does."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path

    arguments = {"pretrained": model, "device": "cpu", **model_args}
    paths = [str(tasks_path()), *([] if directory is None else [str(directory)])]
    return simple_evaluate(
        model=WRAPPER, model_args=",".join(f"{key}={value}" for key, value in arguments.items()), tasks=list(tasks),
        batch_size=1, bootstrap_iters=0, limit=limit, gen_kwargs="max_new_tokens=8",
        task_manager=TaskManager("ERROR", include_path=paths, include_defaults=False, model_name=WRAPPER),
    )  # fmt: skip


def infos(results: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    return [sample["token_counts"][0] for sample in results["samples"][task]]


def heard(monkeypatch: Any) -> list[np.ndarray]:
    """What upstream's wrapper hands to its processor from now on, sound by sound."""
    from lmms_eval.models.simple import qwen2_audio

    own, found = qwen2_audio.split_audio, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        pieces = own(*args, **kwargs)
        found.extend(np.array(piece) for piece in pieces)
        return pieces

    monkeypatch.setattr(qwen2_audio, "split_audio", spy)
    return found
