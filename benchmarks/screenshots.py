"""Takes the README's pictures of the report page, with any Chromium on the path.

make demo demo-sounds && .venv/bin/python benchmarks/screenshots.py
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main(demos: Path) -> int:
    """Writes docs/report-desktop.png, docs/report-sample.png, docs/report-phone-dark.png and docs/report-sounds.png."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    report, sounds = (demos / model / "report.html" for model in ("tiny-llava", "tiny-audio"))
    if executable is None or not report.exists() or not sounds.exists():
        missing = (
            f"browser: {', '.join(BROWSERS)}"
            if executable is None
            else f"pages {report} and {sounds}: run `make demo demo-sounds` first"
        )
        print(f"screenshots: no {missing}", file=sys.stderr)
        return 1
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        shoot(browser, report, "report-desktop", (1180, "light", 1), (".hero", "#results .scroll"))
        shoot(browser, report, "report-sample", (1180, "light", 1), ("#samples article", "#samples article"))
        shoot(browser, report, "report-phone-dark", (390, "dark", 2), (".hero", ".tiles"))
        shoot(browser, sounds, "report-sounds", (1180, "light", 1), ("#samples article", "#samples article"))
        browser.close()
    return 0


def shoot(browser: Browser, report: Path, name: str, screen: tuple[int, str, int], span: tuple[str, str]) -> None:
    """Whole width of the page, from the first element of `span` to the last; `screen`: width, theme, device pixels."""
    width, theme, scale = screen
    context = browser.new_context(
        viewport={"width": width, "height": 844},
        color_scheme="dark" if theme == "dark" else "light",
        device_scale_factor=scale,
    )
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    first, last = (page.locator(selector).first.bounding_box() for selector in span)
    assert first is not None and last is not None
    margin = 20
    clip = {"x": 0, "y": max(0, first["y"] - margin), "width": width, "height": 0}
    clip["height"] = last["y"] + last["height"] + margin - clip["y"]
    page.screenshot(path=ROOT / "docs" / f"{name}.png", full_page=True, clip=clip)  # type: ignore[arg-type]
    context.close()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "demo"))
