"""The report page about sounds: what is heard is what was scored, and what is seen is what is heard."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from handmade_runs import write_runs
from test_page import decode, read

from lmms_smoothguard.errors import ConfigError, SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.report import documents as documents_module
from lmms_smoothguard.report.clips import ClipGallery, spectrogram
from lmms_smoothguard.report.demo import run_demo, run_report
from lmms_smoothguard.report.experiments import HEARING, SEEING
from lmms_smoothguard.report.page import logged_defense
from lmms_smoothguard.sounds import PCM, Sound, read_clip, sound_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("sounds"), on=HEARING)


@pytest.fixture(scope="module")
def page(directory):
    return read(directory)


def heard(attributes):
    kind, _, data = attributes["src"].partition(";base64,")
    assert kind == "data:audio/wav"
    return read_clip(base64.b64decode(data)).mono()


def test_every_sample_has_a_player_of_what_was_scored(page):
    players, pictures = page.of("audio"), page.of("img")
    assert len(players) == len(pictures) == 4 * 8  # six at even distances, two more that the defence lost
    assert all("controls" in one and one["aria-label"] for one in players)
    assert all(one["alt"].startswith("Spectrogram: ") for one in pictures)
    for number, place in ((0, 0), (2, 4), (11, 28)):
        clean, adversarial, difference, noisy = (heard(one) for one in players[place : place + 4])
        document = list(documents_module.documents("sounds_pope", True).values())[number]
        assert np.array_equal(clean.pcm, sound_of(document["audio"]).pcm)
        change = adversarial.pcm.astype(int) - clean.pcm
        assert np.abs(change).max() == 32
        assert np.array_equal(difference.pcm, int(0.1 * PCM / 32) * change)
        spread = (noisy.samples - adversarial.samples)[np.abs(noisy.samples) < 0.9].std()
        assert spread == pytest.approx(0.02, rel=0.02)


def test_the_page_speaks_of_sounds(page):
    said = " ".join(page.text.partition("SmoothGuard · ")[2].split())  # what stands before it is style
    assert "Each clip is changed by at most 0.00098 of full scale, in the median 42 dB below it." in said
    assert "with noise on the clip" in said and "sigma 0.02 in amplitude" in said
    for word in ("picture", "grey level", "LLaVA", "/255", "scenes"):
        assert word not in said.replace("PGD-40, 4/255", "").replace("budget 4/255", ""), word  # the hand-made attack's
    policy = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert "media-src data:;" in policy[0]


def test_the_page_of_pictures_has_no_players(tmp_path):
    assert not read(write_runs(tmp_path, count=6)).of("audio")


def test_a_spectrogram_has_low_notes_below_and_one_scale():
    times = np.arange(16000) / 16000
    low, high = (Sound(np.sin(2 * np.pi * tone * times).astype(np.float32), 16000) for tone in (500, 6000))
    loudest = 1e4
    for sound, place in ((low, 500), (high, 6000)):
        brightness = spectrogram(sound, loudest).astype(int).sum((1, 2))
        row = len(brightness) - 1 - int(brightness.argmax())
        assert row * 8000 / (len(brightness) - 1) == pytest.approx(place, abs=100)
    quiet = spectrogram(Sound(low.samples / 100, 16000), loudest).astype(int).sum()
    assert quiet < spectrogram(low, loudest).astype(int).sum()


def test_the_noisy_clip_is_what_the_model_heard(tmp_path, monkeypatch):
    """Copy 1 as generate got it, in lmms-eval, against copy 1 as the page draws it again from the log."""
    pytest.importorskip("lmms_eval")
    import sound_miniatures

    from lmms_smoothguard.noise import WaveformNoise

    given, draw = [], WaveformNoise.clips

    def spied(self, number):
        clips = draw(self, number)
        if number == 1:
            given.append(clips[0])
        return clips

    monkeypatch.setattr(WaveformNoise, "clips", spied)
    monkeypatch.setenv("SMOOTHGUARD_CACHE", str(tmp_path / "cache"))
    found = sound_miniatures.run(
        HEARING.place, None, ["sounds_pope_pgd"], limit=1, attack_steps=2, audio_sigma=0.03, num_samples=3, seed=5
    )
    row = found["samples"]["sounds_pope_pgd"][0]
    sample = Sample("0", row["target"], "", row["token_counts"][0])
    write_runs(tmp_path / "logs", count=1, num_samples=3, on=HEARING)
    for results in (tmp_path / "logs").rglob("*_results.json"):
        results.write_text(
            results.read_text().replace("audio_sigma=0.02", "audio_sigma=0.03").replace("seed=3", "seed=5")
        )
    config = logged_defense(tmp_path / "logs" / "smoothguard")
    shown = ClipGallery(tmp_path / "cache" / "attacks", "sounds_pope_pgd", HEARING.place, config).of(sample)
    assert len(given) == 2  # the run's and the page's
    assert np.array_equal(given[0], given[1])
    assert np.array_equal(read_clip(shown.by_kind["noisy"].clip).mono().pcm, Sound(given[0], 16000).pcm)


def test_a_demo_of_no_embedded_model_and_one_over_anothers_are_refused(directory):
    with pytest.raises(ConfigError, match=r"model is .tiny-video'; .*tiny-llava"):
        run_demo(directory, 2, "tiny-video")
    with pytest.raises(
        ConfigError, match="has the demo of tiny-audio; expected another directory for that of tiny-llava"
    ):
        run_demo(directory, 2, SEEING.model)


def test_a_sound_that_is_not_the_runs_is_refused(tmp_path):
    write_runs(tmp_path, count=2, on=HEARING)
    for log in tmp_path.rglob("*_samples_sounds_pope_pgd.jsonl"):
        log.write_text(log.read_text().replace('"attack_linf": 0.0009765625', '"attack_linf": 0.01'))
    with pytest.raises(SmoothGuardError, match=r"the adversarial sound of sounds_pope_pgd.* but its log says 0.01000"):
        run_report(tmp_path)


def test_pictures_are_decoded_by_the_page_tests_own_means(page):
    """A spectrogram's picture is a picture."""
    assert decode(page.of("img")[0]["src"]).shape[2] == 3
