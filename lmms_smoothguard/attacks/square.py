"""Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049), L-inf and L2: random search that needs no gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from lmms_smoothguard.attacks.base import Attack
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.pictures import Objective, Pictures, Progress, norms
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.squares import Window, bump, moved, side, tiles
from lmms_smoothguard.errors import ConfigError, did_you_mean

FEEDBACK = ("scores", "answers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareOptions:
    """feedback: "scores", the model's logits through the loss of the settings, as published; or "answers", only whether the
    greedy answer still begins with the reference (with a target: whether it begins with that); p_init: the share of the
    picture that the first square covers; probes: with "answers", noisy copies that are asked beside every picture;
    probe_sigma: their standard deviation in [0, 1] pixel units."""

    feedback: str = "scores"
    p_init: float = 0.8
    probes: int = 31
    probe_sigma: float = 0.25

    def __post_init__(self) -> None:
        if self.feedback not in FEEDBACK:
            raise ConfigError(f"attack feedback is {self.feedback!r}; {did_you_mean(str(self.feedback), FEEDBACK)}")
        if not _number(self.p_init) or not 0 < self.p_init <= 1:
            raise ConfigError(
                f"attack p_init is {self.p_init!r}; expected a share of the picture, above 0 and at most 1"
            )
        if isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 0:
            raise ConfigError(f"attack probes is {self.probes!r}; expected a whole number of at least 0")
        if not _number(self.probe_sigma) or not math.isfinite(self.probe_sigma) or self.probe_sigma < 0:
            raise ConfigError(f"attack probe_sigma is {self.probe_sigma!r}; expected 0 or more in [0, 1] pixel units")


class Square(Attack):
    """Squares of random place and sign, each kept where the objective grows. `steps` are the queries of a row: the
    pictures that the model is asked about.

    With feedback "answers" a picture costs 1 + `probes` queries: its score is 1 where the model leaves its answer, plus the
    share of the noisy copies where it does, which is there to climb before the picture itself is through. Noise is the same
    for every picture, queries are 8-bit pictures, and equal scores count as progress (else nothing ever moves on a plateau).
    It is an attacker who reads texts and has patience; one who must not be noticed has fewer queries. Nothing but texts is
    used, except that a restart is chosen by them too, and that "the greedy answer begins with" these tokens is told from one
    teacher-forced pass instead of decoding.

    With `eot=K` a query is the mean over K draws of the defence's noise, so K passes of the model. Both the old and the new
    picture are asked anew, under the same draws: each comparison costs two queries then, 2 K passes, and no lucky draw is ever
    carried along.
    """

    options = SquareOptions
    defaults = {"steps": 1000}  # noqa: RUF012
    needs_gradients = False

    def __init__(self, settings: AttackSettings) -> None:
        super().__init__(settings)
        self._by_answers = settings.options.feedback == "answers"
        self._asked = _queries(settings)

    @classmethod
    def check(cls, settings: AttackSettings) -> None:
        """Refuses fewer queries than the first picture costs."""
        if settings.steps < (least := _queries(settings)):
            passes = f", each the mean of {settings.eot} passes" if settings.eot else ""
            raise ConfigError(
                f"attack steps is {settings.steps} queries{passes}, and judging one picture costs {least}; expected more "
                "steps or fewer probes"
            )

    def objective(self, threat: Threat) -> Objective:
        """Scores, or nothing but whether the answer is another."""
        if not self._by_answers:
            return super().objective(threat)
        return AnswerLoss(threat, "led away" if self.settings.target is None else "forced")

    def start(self, clean: Pictures, number: int) -> Pictures:
        """The clean pictures: `search` draws the beginning and the squares from one stream a row."""
        return clean

    def search(self, objective: Objective, clean: Pictures, start: Pictures, progress: Progress) -> Pictures:
        """One picture of the prompt in turn gets a new square."""
        with torch.no_grad():
            score = self._probed(objective, clean) if self._by_answers else objective
            total = self.settings.steps // self._asked
            canvases = [self._canvas(slot, total) for slot in clean]
            best = tuple(canvas.first() for canvas in canvases) if self.settings.random_start else start
            value = score(best)
            report = _spread(progress, self._asked)
            report(value)
            for number in range(1, total):
                place = number % len(clean)
                candidate = (*best[:place], canvases[place].next(best[place], number), *best[place + 1 :])
                value, new = self._compared(score, best, candidate, value)
                better = new >= value if self._by_answers else new > value
                chosen = better.view(-1, 1, 1, 1)
                best = tuple(torch.where(chosen.to(a.device), a, b) for a, b in zip(candidate, best, strict=True))
                value = torch.where(better, new, value)
                report(value)
        return best

    def _compared(
        self, score: Objective, best: Pictures, candidate: Pictures, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of both: under EOT in one call, which draws the same for both."""
        if not self.settings.eot:
            return value, score(candidate)
        both = score(tuple(torch.cat(pair) for pair in zip(best, candidate, strict=True)))
        old, new = both.chunk(2)
        return old, new

    def _probed(self, objective: Objective, clean: Pictures) -> Objective:
        options = self.settings.options
        generator = torch.Generator().manual_seed(self.settings.seed)
        noises = [
            tuple(torch.randn(slot.shape[1:], generator=generator).to(slot) * options.probe_sigma for slot in clean)
            for _ in range(options.probes)
        ]

        def score(pictures: Pictures) -> torch.Tensor:
            found = objective(tuple(map(_as_sent, pictures)))
            for noise in noises:
                noisy = (_as_sent(slot + offset) for slot, offset in zip(pictures, noise, strict=True))
                found = found + objective(tuple(noisy)) / options.probes
            return found

        return score

    def _canvas(self, clean: torch.Tensor, total: int) -> _Canvas:
        rows = len(clean) // self.settings.restarts
        generators = [self.generator(image, number // rows) for number, image in enumerate(clean)]
        return _Canvas(self, clean, total, generators)


class _Canvas:
    """One image slot: what is painted on it, each row from a stream of its own."""

    def __init__(self, attack: Square, clean: torch.Tensor, total: int, generators: list[torch.Generator]) -> None:
        self._settings, self._project = attack.settings, attack.project
        self._clean, self._total = clean, total
        channels, height, width = clean.shape[1:]
        first = channels * (width if self._settings.norm == "linf" else height * width)
        self._first = torch.stack([torch.rand(first, generator=g) for g in generators]).to(clean.device)
        self._chance = torch.stack([torch.rand(total, 5 + channels, generator=g) for g in generators]).to(clean.device)

    def first(self) -> torch.Tensor:
        """Stripes of one pixel's width (L-inf), or tiles (L2)."""
        signs, shape = _signs(self._first), self._clean.shape
        if self._settings.norm == "linf":
            return self._project(self._clean + self._settings.eps * signs.view(-1, shape[1], 1, shape[3]), self._clean)
        change = tiles(signs, shape)
        return self._project(self._clean + self._settings.eps * change / norms(change), self._clean)

    def next(self, best: torch.Tensor, number: int) -> torch.Tensor:
        """The best pictures with square `number` (from 1: the first query has none) each."""
        chance, linf = self._chance[:, number], self._settings.norm == "linf"
        size = side(number - 1, self._total, self._settings.options.p_init, best.shape, odd=not linf)
        window = Window.at(chance[:, :2], size, best.shape)
        signs = _signs(chance[:, 5:])[..., None, None]
        if linf:
            return self._filled(best, window, signs)
        pattern = bump(size).to(best)
        pattern = torch.where(chance[:, 4].view(-1, 1, 1, 1) < 0.5, pattern, pattern.T)
        change = moved(
            best - self._clean, self._settings.eps, window, Window.at(chance[:, 2:4], size, best.shape), pattern * signs
        )
        return self._project(self._clean + change, self._clean)

    def _filled(self, best: torch.Tensor, window: Window, signs: torch.Tensor) -> torch.Tensor:
        """Every channel of a square to one end of the ball; to the other end where all stood there already."""
        origin = window.read(self._clean)

        def content(signs: torch.Tensor) -> torch.Tensor:
            return self._project(origin + self._settings.eps * signs, origin)

        same = (content(signs) - window.read(best)).abs().amax((1, 2, 3), keepdim=True) < 1e-6
        return window.painted(best, content(torch.where(same, -signs, signs)))


def _queries(settings: AttackSettings) -> int:
    """What judging one picture costs; under EOT the one it is compared with, too."""
    copies = 1 + settings.options.probes if settings.options.feedback == "answers" else 1
    return copies * (2 if settings.eot else 1)


def _signs(chance: torch.Tensor) -> torch.Tensor:
    return torch.where(chance < 0.5, -1.0, 1.0)


def _as_sent(pictures: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit picture: nobody can ask about another."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def _spread(progress: Progress, queries: int) -> Callable[[torch.Tensor], None]:
    """Reports a value once for each of the queries it cost."""
    done = 0

    def report(value: torch.Tensor) -> None:
        nonlocal done
        for _ in range(queries):
            done += 1
            progress(done, value)

    return report


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
