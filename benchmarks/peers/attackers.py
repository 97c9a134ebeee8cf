"""The same attack from three sides: our `Crafter`, adversarial-robustness-toolbox, torchattacks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.pgd import PGD
from lmms_smoothguard.attacks.settings import AttackSettings
from peers.questions import Question, QuestionClassifier, Subject, pictures_of

OURS, ART, TORCHATTACKS = "lmms-smoothguard", "ART", "torchattacks"
BUDGETS = {"linf": 4 / 255, "l2": 0.5}


@dataclass(frozen=True)
class Case:
    """An attack in a budget, everything else as each side has it."""

    attack: str
    loss: str
    norm: str
    steps: int
    batch_size: int
    seed: int = 0

    @property
    def settings(self) -> AttackSettings:
        """Ours; its eps and step are everybody's."""
        return AttackSettings.parse(
            {"name": self.attack, "loss": self.loss, "norm": self.norm, "eps": BUDGETS[self.norm], "steps": self.steps}
            | {"seed": self.seed}
        )

    @property
    def sides(self) -> tuple[str, ...]:
        """Who has this attack with this loss."""
        return (OURS,) if self.loss == "margin" else (OURS, ART, TORCHATTACKS)


CASES = (("pgd", "ce"), ("apgd", "ce"), ("apgd", "dlr"), ("pgd", "margin"), ("apgd", "margin"))
"""Attack and loss. DLR is for attacks on the margin's sign; neither library has PGD with it, and the margin is ours."""

Run = Callable[[Sequence[Question]], torch.Tensor]
"""Questions -> adversarial 8-bit pictures (questions, 3, height, width) in [0, 1]."""


def run_of(side: str, subject: Subject, case: Case) -> Run:
    """One side's attack, from questions to pictures."""
    if side == OURS:
        return lambda questions: _ours(subject, case, questions)
    peer = _art if side == ART else _torchattacks

    def run(questions: Sequence[Question]) -> torch.Tensor:
        torch.manual_seed(case.seed)
        np.random.seed(case.seed)
        classifier = QuestionClassifier(subject, questions)
        clean, numbers = pictures_of(questions), range(len(questions))
        found = peer(classifier, case, classifier.carrying(clean, numbers), torch.tensor([q.label for q in questions]))
        if classifier.numbers(found).tolist() != list(numbers):
            raise RuntimeError(f"{side} {case} moved a question's number; the rows were asked something else")
        return PGD(AttackSettings(norm=case.norm, eps=BUDGETS[case.norm])).to_whole_steps(found[:, :, :-1], clean)

    return run


def _ours(subject: Subject, case: Case, questions: Sequence[Question]) -> torch.Tensor:
    jobs = [Job(case.settings, (q.image,), q.inputs, (q.label,)) for q in questions]
    with tempfile.TemporaryDirectory() as directory:
        crafter = Crafter(
            subject.model, subject.processor, AttackCache(Path(directory)), batch_size=case.batch_size, quiet=True
        )
        entries = crafter.craft(jobs)
    return torch.stack([torch.from_numpy(entry.images[0].copy()).permute(2, 0, 1) / 255 for entry in entries])


def _art(classifier: QuestionClassifier, case: Case, carried: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from art.attacks.evasion import AutoProjectedGradientDescent, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classes = classifier.inner.get_output_embeddings().weight.shape[0]
    estimator = PyTorchClassifier(
        classifier,
        torch.nn.CrossEntropyLoss(),
        input_shape=tuple(carried.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    settings = case.settings
    common = {
        "norm": np.inf if case.norm == "linf" else 2,
        "eps": settings.eps,
        "max_iter": case.steps,
        "batch_size": case.batch_size,
        "verbose": False,
    }
    if case.attack == "pgd":
        attack = ProjectedGradientDescentPyTorch(estimator, eps_step=settings.step, num_random_init=1, **common)
    else:
        loss = {"ce": "cross_entropy", "dlr": "difference_logits_ratio"}[case.loss]
        attack = AutoProjectedGradientDescent(
            estimator, eps_step=2 * settings.eps, nb_random_init=1, loss_type=loss, **common
        )
    return torch.from_numpy(attack.generate(carried.numpy(), labels.numpy()))


def _torchattacks(
    classifier: QuestionClassifier, case: Case, carried: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    import torchattacks

    settings = case.settings
    if case.attack == "apgd":
        norm = {"linf": "Linf", "l2": "L2"}[case.norm]
        attack = torchattacks.APGD(
            classifier, norm=norm, eps=settings.eps, steps=case.steps, seed=case.seed, loss=case.loss
        )
    else:
        kind = torchattacks.PGD if case.norm == "linf" else torchattacks.PGDL2
        attack = kind(classifier, eps=settings.eps, alpha=settings.step, steps=case.steps, random_start=True)
    parts = zip(carried.split(case.batch_size), labels.split(case.batch_size), strict=True)
    return torch.cat([attack(pictures, answers).detach().cpu() for pictures, answers in parts])
