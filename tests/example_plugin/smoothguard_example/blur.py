from dataclasses import dataclass

from torchvision.transforms.functional import gaussian_blur

from lmms_smoothguard.defenses import Defended, Defense, Randomness, Request
from lmms_smoothguard.errors import UndefendableError


@dataclass(frozen=True, kw_only=True)
class BlurConfig:
    width: float = 1.0  # standard deviation, in pixels


def blur(images, config):
    if images.values.ndim != 4:
        raise UndefendableError(f"blur got pixels of shape {tuple(images.values.shape)}; expected (n, 3, h, w)")
    return gaussian_blur(images.values, kernel_size=15, sigma=config.width)


def defend(request: Request, config: BlurConfig) -> Defended | None:
    images = request.images()  # refuses audio, video, caches and whatever it does not know
    if images is None:
        return None  # text alone
    return Defended(request.generate(**{**request.arguments, images.key: blur(images, config)}), [])


DEFENSE = Defense(BlurConfig, defend, Randomness(("width",), lambda draw, config: blur(draw.images, config)))
