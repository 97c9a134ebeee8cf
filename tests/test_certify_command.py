"""`smoothguard certify` end to end on the embedded model: what is written, what is kept when killed, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lmms_smoothguard import certify
from lmms_smoothguard.certifying.asked import Certification, CertifyRun
from lmms_smoothguard.certifying.records import read_certificates
from lmms_smoothguard.certifying.run import run_certify
from lmms_smoothguard.certifying.tables import cells, print_certificates, said
from lmms_smoothguard.certifying.workers import AnswerWorker, FeatureWorker
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.encoder import TowerEncoder, tower_call
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.tiny.scenes import make_scenes

SIGMA = 0.25


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("tiny-llava")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, two of them of the same picture."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    folder.mkdir()
    images = make_scenes(2, 77).images
    for name, image in zip(("a", "b", "c"), (images[0], images[1], images[0]), strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


def _encoder(subject: Subject, **settings: Any) -> TowerEncoder:
    config = FeatureSmoothingConfig(sigma=SIGMA, **settings)
    return TowerEncoder(subject.model, config, subject.processor.image_processor)


def _call(subject: Subject, seed: int = 77) -> Any:
    pixels = subject.processor.image_processor(make_scenes(1, seed).images[0], return_tensors="pt")["pixel_values"]
    encoder = _encoder(subject)
    return tower_call(encoder.tower, lambda: subject.model.get_image_features(pixel_values=pixels))


# -- the encoder -------------------------------------------------------------------------------------------------------


def test_clean_features_are_the_plain_towers_and_copies_are_the_servers(subject: Subject) -> None:
    call, encoder = _call(subject), _encoder(subject)
    tower = subject.model.model.vision_tower
    layer = subject.model.config.vision_feature_layer
    with torch.no_grad():
        expected = tower(*call.args, output_hidden_states=True)
        plain = expected.hidden_states[layer][0, 1:]
    clean = encoder.clean(call)
    assert torch.allclose(clean, plain / plain.norm(dim=1, keepdim=True), atol=1e-5)
    parts = list(encoder.noisy(call, 70, torch.Generator().manual_seed(0)))
    assert sum(map(len, parts)) == 70 and parts[0].shape[1:] == clean.shape
    few = _encoder(subject, max_copies_per_batch=9)
    again = torch.cat(list(few.noisy(call, 70, torch.Generator().manual_seed(0))))
    assert torch.allclose(torch.cat(parts), again, atol=1e-5)  # batches change no draw
    other = torch.cat(list(encoder.noisy(call, 70, torch.Generator().manual_seed(1))))
    assert not torch.allclose(again, other, atol=1e-2)
    assert torch.unique(again[:, 0, 0]).numel() == 70  # no copy twice


def test_no_perturbation_that_gradients_find_breaks_a_certificate(subject: Subject) -> None:
    """A failure only where even an upper confidence bound of the attacked similarity lies below the certificate."""
    call, encoder = _call(subject), _encoder(subject)
    certificate = certify.certify_image(encoder, call, n=200, estimation=torch.Generator().manual_seed(0)).feature
    pixels, std = call.args[0], subject.processor.image_processor.image_std[0]
    for share in (0.3, 0.9):
        radius = share * certificate.radius(0.0)
        change = _worst(encoder, pixels, encoder.clean(call).clone(), std, radius)
        assert float(change.norm()) == pytest.approx(radius, rel=1e-4)
        attacked = call._replace(args=(pixels + change / std,))
        rows = torch.cat(list(encoder.noisy(attacked, 200, torch.Generator().manual_seed(0))))
        inner = (rows * encoder.clean(call)).sum(-1).mean(1).numpy()
        assert inner.mean() < certificate.score - 0.005 * share  # the same noise as the certificate's
        assert 2 * certify.upper_mean((1 + inner) / 2, 1e-3).value - 1 >= certificate.at(radius)


def _worst(encoder: TowerEncoder, pixels: torch.Tensor, clean: torch.Tensor, std: float, radius: float) -> torch.Tensor:
    """A change of the [0, 1] pixels, of that L2 norm, that lowers the smoothed similarity: projected gradient descent."""
    change, draws = torch.zeros_like(pixels), torch.Generator().manual_seed(1)
    for _ in range(8):
        change.requires_grad_(True)
        noise = SIGMA * torch.randn((8, *pixels.shape[1:]), generator=draws)
        copies = (pixels + (change + noise) / std).clamp(-1, 1)
        found = encoder.tower.selected(encoder.tower.module(copies, output_hidden_states=True))[0]
        (slope,) = torch.autograd.grad(torch.nn.functional.cosine_similarity(found, clean[None], dim=-1).mean(), change)
        change = (change - 0.5 * radius * slope / slope.norm()).detach()
        change *= radius / float(change.norm())
    return change


def test_a_request_without_a_picture_has_no_tower_call(subject: Subject) -> None:
    with pytest.raises(UndefendableError, match="ran without its vision tower"):
        tower_call(_encoder(subject).tower, lambda: None)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_features_of_a_folder(subject: Subject, pictures: Path, tmp_path: Path) -> None:
    asked = CertifyRun(model="tiny-llava", data=str(pictures), out=tmp_path / "run", n=40, radii=(0.05, 0.1, 2.0))
    record, files = run_certify(asked, "smoothguard certify ...")
    assert [file.name for file in files] == ["certify.json", "certificates.parquet", "certify.svg", "certify.png"]
    assert all(file.stat().st_size > 500 for file in files)
    assert read_certificates(files[0]) == record
    assert record.data.count == 2  # a picture that is there twice is certified once
    import pyarrow.parquet as parquet

    rows = parquet.read_table(files[1]).to_pylist()
    assert [row["id"] for row in rows] == ["a.png", "b.png"]
    for row in rows:
        assert row["lower"] < row["score"] and len(row["token_lowers"]) == row["tokens"] == 64
        assert row["token_alpha"] == pytest.approx(0.001 / 64) and row["alpha_kl"] == 0.0005
        assert row["score"] == pytest.approx(np.mean(row["token_scores"]), abs=1e-6)
    lowers = [row["lower"] for row in rows]
    figures = record.figures
    assert figures["lower"].value == pytest.approx(np.mean(lowers)) and figures["lower"].count == 2
    held = [certify.fcsb(lower, 0.1, SIGMA) >= 0.0 for lower in lowers]
    assert figures["cos0@0.1"].hits == sum(held)
    assert figures["cos0@2"].value is None and figures["cos0@2"].method.startswith("ABSTAIN")
    assert record.largest["0"] == pytest.approx(certify.largest_feature_radius(40, 0.001, SIGMA))
    heads, table = cells(record)
    assert heads[0] == "L2 radius" and table[2][2] == "ABSTAIN" and "%" in table[0][2]
    assert "n = 40" in " ".join(said(record))
    far = [
        value
        for radius, value in zip(record.curves["radius"], record.curves["cos0"], strict=True)
        if radius > record.largest["0"]
    ]
    assert far and set(far) == {None}


def test_a_killed_run_goes_on_and_other_settings_are_refused(
    subject: Subject, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"model": "tiny-llava", "data": str(pictures), "n": 12, "radii": (0.05,)}
    done: list[str] = []
    certified = FeatureWorker.certify

    def until_killed(self: FeatureWorker, question: Any, digest: str) -> dict[str, Any]:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(question.id)
        return certified(self, question, digest)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWorker, "certify", until_killed)
        with pytest.raises(KeyboardInterrupt):
            run_certify(CertifyRun(out=tmp_path / "cut", **asked), "")
    assert done == ["a.png"] and not (tmp_path / "cut" / "certify.json").exists()

    def noted(self: FeatureWorker, question: Any, digest: str) -> dict[str, Any]:
        done.append(question.id)
        return certified(self, question, digest)

    monkeypatch.setattr(FeatureWorker, "certify", noted)
    run_certify(CertifyRun(out=tmp_path / "cut", **asked), "")
    assert done == ["a.png", "b.png"]
    run_certify(CertifyRun(out=tmp_path / "whole", **asked), "")
    names = ("certificates.parquet", "certify.json", "certify.svg")
    assert all((tmp_path / "cut" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in names)
    with pytest.raises(ConfigError, match=r"certificate\.sigma is 0\.25 there and 0\.3 here"):
        run_certify(CertifyRun(out=tmp_path / "cut", sigma=0.3, **asked), "")
    record, _ = run_certify(CertifyRun(out=tmp_path / "cut", **asked | {"radii": (0.01, 0.02)}), "")
    assert "cos0@0.02" in record.figures and done == ["a.png", "b.png", "a.png", "b.png"]  # the table may ask anew
    shutil.copytree(tmp_path / "cut", tmp_path / "strange")
    settings = json.loads((tmp_path / "strange" / "settings.json").read_text())
    (tmp_path / "strange" / "settings.json").write_text(json.dumps(settings | {"made_by": "smoothguard attack"}))
    with pytest.raises(ConfigError, match="not of `smoothguard certify`"):
        run_certify(CertifyRun(out=tmp_path / "strange", **asked), "")


def test_answers_are_cohens(subject: Subject, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    out = tmp_path / "answers"
    ran = CliRunner().invoke(
        app,
        ["certify", "tiny-llava", "shapes_pope", "--what", "answers", "--limit", "2", "--n", "40", "--n-select", "5",
         "--batch-size", "40", "--radii", ".05,.4", "--out", str(out)],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "ABSTAIN" in ran.output and "noisy vote" in ran.output
    record = read_certificates(out / "certify.json")
    assert record.command == (
        "smoothguard certify tiny-llava shapes_pope --what answers --n 40 --n-select 5 --radii .05,.4 --limit 2 --batch-size 40"
    )
    import pyarrow.parquet as parquet

    for row in parquet.read_table(out / "certificates.parquet").to_pylist():
        expected = certify.certify_votes(row["selected"], row["votes"], 40, sigma=0.25)
        assert row["radius"] == expected.radius and row["p_lower"] == expected.p_lower
        assert row["clean_answer"] in ("Yes", "No") and row["selected"] == row["selected"].lower()
    assert record.figures["certified@0.05"].count == 2 and record.figures["certified@0.4"].value is None
    print_certificates(record)


def test_selection_and_estimation_see_different_noise(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_smoothguard.evaluation.questions import Question

    asked = Certification(model="tiny-llava", data="-", out=Path("-"), what="answers", n=6, n_select=4)
    seeds: list[int] = []
    answers = AnswerWorker._answers

    def noted(self: AnswerWorker, inputs: Any, count: int, seed: int, noise: Any) -> list[str]:
        seeds.append(seed)
        return answers(self, inputs, count, seed, noise)

    monkeypatch.setattr(AnswerWorker, "_answers", noted)
    worker = AnswerWorker(asked, subject, 4)
    question = Question(
        "q", (Image.fromarray(make_scenes(1, 5).images[0]),), "Is there a red circle in the image?", label="yes"
    )
    made = worker.certify(question, "digest")
    assert made["certificate"]["n"] == 6 and made["certificate"]["n_selection"] == 4
    worker.certify(question, "another digest")
    assert len(set(seeds)) == 4
    assert worker.certify(question, "digest")["certificate"] == made["certificate"]


@pytest.mark.parametrize("sigma", [0.004, 0.3])
def test_sounds_are_noised_at_the_certificates_sigma(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_smoothguard.evaluation.questions import Question
    from lmms_smoothguard.inputs.carried import CarriedClips
    from lmms_smoothguard.sounds import Sound

    offsets: list[np.ndarray] = []
    extract = CarriedClips.extract

    def noted(self: CarriedClips, versions: Any) -> list[torch.Tensor]:
        offsets.extend(noisy - clean for version in versions for noisy, clean in zip(version, self.clips, strict=True))
        return extract(self, versions)

    monkeypatch.setattr(CarriedClips, "extract", noted)
    asked = Certification(model="tiny-audio", data="-", out=Path("-"), what="answers", n=3, n_select=2, sigma=sigma)
    sound = Sound((0.1 * np.random.default_rng(0).standard_normal(16000)).astype(np.float32), 16000)
    made = AnswerWorker(asked, Subject("tiny-audio"), 2).certify(Question("q", (), "Is it loud?", sounds=(sound,)), "d")
    assert made["certificate"]["sigma"] == sigma
    assert len(offsets) == 3 + 2
    assert [float(offset.std()) for offset in offsets] == pytest.approx([sigma] * 5, rel=0.05)


def test_classes_of_a_dual_encoder(tmp_path: Path) -> None:
    """On random weights: what is asked of the encoder and how it is told, not what it is worth."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    from lmms_smoothguard.tiny.model import MODEL_DIR

    model, tokenizer = _random_clip()
    model.save_pretrained(tmp_path / "clip")
    CLIPProcessor(CLIPImageProcessor.from_pretrained(MODEL_DIR), tokenizer).save_pretrained(tmp_path / "clip")
    import datasets

    images = [Image.fromarray(image) for image in make_scenes(3, 9).images]
    rows = datasets.Dataset.from_dict({"image": images, "label": ["red", "blue", "red"]})
    rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "data.parquet"))
    asked = {
        "model": str(tmp_path / "clip"),
        "data": str(tmp_path / "data.parquet"),
        "what": "classes",
        "n": 20,
        "n_select": 5,
    }
    record, files = run_certify(CertifyRun(out=tmp_path / "run", radii=(0.01,), prompts=("{}", "a {}"), **asked), "")
    assert record.settings["model"]["classes"] == ["blue", "red"] and record.figures["accuracy"].count == 3
    assert record.largest == {"0": pytest.approx(certify.largest_class_radius(20, 0.001, 0.25, 2))}
    import pyarrow.parquet as parquet

    for row in parquet.read_table(files[1]).to_pylist():
        assert row["label"] in ("red", "blue") and row["selected"] in ("red", "blue")
        assert row["right"] == (row["label"] == row["selected"]) and len(row["scores"]) == 2
        assert row["alpha_scores"] == 0.00025 and row["alpha_difference"] == 0.0005
    with pytest.raises(ConfigError, match="has 1 different labels"):
        run_certify(CertifyRun(out=tmp_path / "one", limit=1, **asked), "")


def _random_clip() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(("<pad>", "<unk>", "<s>", "</s>", "a", "red", "blue"))}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 8, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
              "patch_size": 16}  # fmt: skip
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval(), tokenizer


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"sigma": 0}, "sigma is 0; expected a number above 0"),
        ({"sigma": 9}, "sigma is 9; expected at most 5 of pictures .* at most 1 of sounds"),
        ({"n0": 1}, "n0 is 1"),
        ({"n": 1}, "n is 1"),
        ({"alpha": 1}, "alpha is 1"),
        ({"beta": 0}, "beta is 0"),
        ({"radii": ()}, "radii are empty"),
        ({"radii": (0.1, -1)}, "radius is -1"),
        ({"what": "feature"}, "did you mean 'features'"),
        ({"reference": "served", "what": "answers"}, "reference is 'served'"),
        ({"booster": "psm", "what": "answers"}, "booster is 'psm', and --what is answers"),
        ({"what": "classes", "prompts": ("a photo",)}, "prompt is 'a photo'"),
        ({"what": "classes", "classes": ("cat",)}, "two or more different names"),
        ({"classes": ("cat", "dog")}, "classes are given, and --what is features"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_requests_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        CertifyRun(**{"model": "tiny-llava", "data": "x", "out": Path("y"), **wrong})


def test_noise_and_radii_are_those_of_the_medium() -> None:
    def asked(**fields: Any) -> CertifyRun:
        return CertifyRun(model="tiny-audio", data="x", out=Path("y"), what="answers", alpha=0.01, **fields)

    of_pictures = asked().about(sounds=False)
    assert (of_pictures.sigma, of_pictures.radii, of_pictures.alpha) == (0.25, (0.1, 0.25, 0.5), 0.01)
    assert asked(sigma=0.02).about(sounds=True).radii == (0.01, 0.02, 0.04)
    for sounds in (True, False):
        given = asked(sigma=0.3, radii=(0.7,)).about(sounds=sounds)
        assert (given.sigma, given.radii) == (0.3, (0.7,))
    with pytest.raises(ConfigError, match=r"sigma is not given.* such as --sigma 0\.02, SmoothGuard's audio_sigma"):
        asked().about(sounds=True)
    with pytest.raises(ConfigError, match=r"sigma is 2; expected at most 1 of sounds, in amplitude"):
        asked(sigma=2).about(sounds=True)
    assert asked(sigma=2).about(sounds=False).sigma == 2


def test_bad_requests_of_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    given = ["certify", "tiny-llava", "shapes_pope", "--out", str(tmp_path / "out")]
    for more, told in ((["--radii", ".1;.2"], "--radii is '.1;.2'"), (["--column", "label"], "--column is 'label'"),
                       (["--match", "fuzzy"], "match is 'fuzzy'")):  # fmt: skip
        ran = CliRunner().invoke(app, [*given, *more])
        assert isinstance(ran.exception, ConfigError) and told in str(ran.exception)
    assert not (tmp_path / "out").exists()
