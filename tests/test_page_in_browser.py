"""The report page in a real browser: what a reader sees, at desk and phone width, in both themes."""

from __future__ import annotations

import shutil

import pytest
from handmade_runs import hostile_answers, write_runs

pytestmark = pytest.mark.slow

WIDTHS = {"desk": 1280, "phone": 390}
# Own text of every visible element: its colour, what is behind it, and where it lies.
TEXTS = """() => {
  const solid = color => !/^rgba\\(.*, 0\\)$|^transparent$/.test(color);
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    const unseen = element.closest('title, desc') || innerWidth < 761 && element.closest('thead');
    if (!own || !box.width || unseen) continue;
    let behind = element, faded = false;
    for (let e = element; e; e = e.parentElement) faded ||= Number(getComputedStyle(e).opacity) < 1;
    while (behind && !solid(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const card = element.closest('.card'), frame = card && card.getBoundingClientRect();
    found.push({
      text: element.textContent.trim().slice(0, 60), faded,
      color: element.namespaceURI.endsWith('svg') ? style.fill : style.color,
      behind: getComputedStyle(behind || document.body).backgroundColor,
      left: box.left, right: box.right, card: frame && [frame.left, frame.right],
    });
  }
  return found;
}"""
CHIPS = """() => [...document.querySelectorAll('.chip')].map(chip => {
  const badge = chip.querySelector('.badge');
  return {letter: badge.textContent, label: badge.ariaLabel, color: getComputedStyle(badge).backgroundColor,
          outline: getComputedStyle(chip).borderTopStyle};
})"""


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser found; looked for {', '.join(names)} on the path")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of a real, small run of the demo, and one of hostile and unwieldy text."""
    from lmms_smoothguard.report.demo import run_demo, run_report
    from lmms_smoothguard.report.experiments import HEARING

    odd = write_runs(tmp_path_factory.mktemp("odd"), answers=hostile_answers, num_samples=20)
    sounds = run_report(write_runs(tmp_path_factory.mktemp("sounds"), on=HEARING))
    return {"demo": run_demo(tmp_path_factory.mktemp("demo"), 8), "odd": run_report(odd), "sounds": sounds}


@pytest.fixture(params=[(which, width, theme) for which in ("demo", "odd", "sounds") for width in WIDTHS for theme in ("light", "dark")],
                ids=lambda param: "-".join(param))  # fmt: skip
def shown(request, chromium, pages):
    """(page, its theme, console messages and errors, addresses asked for), with every list unfolded."""
    which, width, theme = request.param
    context = chromium.new_context(viewport={"width": WIDTHS[width], "height": 844}, color_scheme=theme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(pages[which].as_uri(), wait_until="load")
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    yield page, theme, said, asked
    context.close()


def test_what_a_reader_sees(shown):
    page, theme, said, asked = shown
    assert said == []
    assert {address.partition(":")[0] for address in asked} <= {"file", "data"}
    assert sum(address.startswith("file:") for address in asked) == 1
    assert page.evaluate("typeof window.broken") == "undefined"

    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth, image.width])")
    assert len(images) >= 4 * 6
    assert all(complete and natural >= 64 and drawn > 100 for complete, natural, drawn in images)
    page.wait_for_function("[...document.querySelectorAll('audio')].every(one => one.readyState > 0 || one.error)")
    players = page.evaluate(
        "[...document.querySelectorAll('audio')].map(one => [one.duration, one.error, one.offsetWidth])"
    )
    assert len(players) == (len(images) if "sounds" in page.url else 0)
    assert all(seconds == 2 and error is None and drawn > 100 for seconds, error, drawn in players)

    texts = page.evaluate(TEXTS)
    assert len(texts) > 100
    assert not [text for text in texts if text["faded"]]
    off = [t for t in texts if t["left"] < -0.5 or t["right"] > width + 0.5]
    assert off == []
    spilt = [t for t in texts if t["card"] and not t["card"][0] <= t["left"] <= t["right"] <= t["card"][1]]
    assert spilt == []
    pale = [(round(ratio, 2), t["text"]) for t in texts if (ratio := contrast(t["color"], t["behind"])) < 4.5]
    assert pale == []
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert ground > 0.8 if theme == "light" else ground < 0.05


def test_groups_are_told_apart_without_colour(shown):
    page, *_ = shown
    chips = page.evaluate(CHIPS)
    looks = {chip["letter"]: (chip["color"], chip["outline"]) for chip in chips}
    assert set(looks) >= {"A", "B"}
    assert all(chip["label"] == f"group {chip['letter']}" for chip in chips)
    assert len({color for color, _ in looks.values()}) == min(len(looks), 7)
    for one, other in zip("ABC", "BCD", strict=True):
        if {one, other} <= set(looks):
            assert looks[one][1] != looks[other][1]


def numbers(color):
    assert color.startswith("rgb("), f"{color} is not an opaque colour"
    return [int(part) / 255 for part in color[4:-1].split(",")]


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers(color)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    """WCAG 2's ratio, 1 to 21."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
