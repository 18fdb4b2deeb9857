"""The page at ``/``, in headless Chromium, against a stand-in for the API."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest

from .page_server import NESTED, PAGE, PROMPTS, Refusal, StandIn, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright for Python: pip install playwright")

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

Scheme = Literal["light", "dark"]
Open = Callable[..., Page]

WIDE, NARROW = (1200, 900), (400, 800)

EXPECTED_COMPLAINT = "Failed to load resource: the server responded with a status of"
"""What Chromium's console has of an answer that is an error."""

RECORD = """() => {
  window.announced = [];
  for (const region of document.querySelectorAll('[role=status], [role=alert]')) {
    new MutationObserver(() => region.textContent && window.announced.push(region.textContent))
      .observe(region, { childList: true, characterData: true, subtree: true });
  }
}"""
"""Keeps what live regions announce."""

CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), rgba('Canvas'));
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const isSeen = (element) => element.checkVisibility() && !element.closest('.for-screen-readers');
  const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (!isSeen(element) || element.closest('svg, [aria-disabled=true], :disabled')) continue;
    const style = getComputedStyle(element);
    const background = behind(element);
    const name = `${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 30)}`;
    const text = (colour, what) => found.push({ name, what, ratio: ratio(over(rgba(colour), background), background), least: 4.5 });
    if (hasText(element) || element.matches('input, select, textarea')) text(style.color, 'text');
    if (element.placeholder) text(getComputedStyle(element, '::placeholder').color, 'placeholder');
    if (element.matches('input:not([type=range], [type=checkbox]), select, textarea')) {
      const around = behind(element.parentElement);
      found.push({ name, what: 'edge', ratio: ratio(rgba(style.borderTopColor), around), least: 3 });
    }
  }
  return found;
}"""
"""Contrast of every text and of the edges of controls, computed as WCAG does."""

FOCUS = """() => {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  const box = element.getBoundingClientRect();
  const isInSight = element.contains(document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2));
  return [element.id || element.textContent.trim(), style.outlineStyle, parseFloat(style.outlineWidth), isInSight];
}"""
"""What has the focus, how it shows, and whether anything hides it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serving() as server:
        yield server


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complains of; a test that provokes an error empties it."""
    return []


@pytest.fixture
def open_page(browser: Browser, server: StandIn, complaints: list[str]) -> Iterator[Open]:
    """Opens the page. Afterwards nothing must have gone to another origin, and the browser must not have complained."""
    contexts, addresses = [], []

    def open_page(size: tuple[int, int] = WIDE, scheme: Scheme = "light", is_ready: bool = True, **more: Any) -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: addresses.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(server.address)
        if is_ready:
            expect(page.get_by_label("Model").locator("option")).to_have_count(len(server.models))
        page.evaluate(RECORD)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert {f"{urlsplit(url).scheme}://{urlsplit(url).netloc}" for url in addresses if not url.startswith("data:")} == {server.address}
    assert complaints == []


def draw(page: Page) -> None:
    page.get_by_role("button", name="Draw both").click()


def draw_to_the_end(page: Page) -> None:
    draw(page)
    expect(page.locator("#status")).to_contain_text("Done.")


def side(page: Page, name: str) -> Locator:
    return page.get_by_role("figure", name=name)


def letters(place: Locator) -> str:
    return "".join(place.locator(".strip .cell").all_text_contents())


def announced(page: Page) -> list[str]:
    found: list[str] = page.evaluate("window.announced")
    return found


def is_invalid(page: Page, label: str) -> None:
    expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label(label)).to_be_focused()


def test_draws_vanilla_and_gated_one_after_the_other(open_page: Open, server: StandIn) -> None:
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a large green cross")
    page.get_by_role("slider", name="Gate").fill("7")
    page.get_by_label("Seed", exact=True).fill("12")
    draw_to_the_end(page)
    common = {
        "model": NESTED["id"],
        "prompt": "a large green cross",
        "n": 1,
        "stream": True,
        "partial_images": 3,
        "seed": 12,
        "num_inference_steps": 25,
    }
    assert server.drawn == [{**common, "gate": "none"}, {**common, "gate": "7", "after_gate": "negative"}]
    assert server.most_at_once == 1
    expect(side(page, "Vanilla").locator(".time")).to_have_text("0.46 s")
    expect(side(page, "T-GATE").locator(".time")).to_have_text("0.30 s (0.65 of vanilla’s)")
    assert letters(side(page, "Vanilla")) == "P" * 25
    assert letters(side(page, "T-GATE")) == "P" * 7 + "F" * 18
    for name in ("Vanilla", "T-GATE"):
        image = page.get_by_role("img", name=f"{name}, a large green cross", exact=True)
        expect(image).to_have_css("image-rendering", "pixelated")
        assert image.evaluate("image => image.naturalWidth") == 64


@pytest.mark.parametrize("is_flat", [False, True])
def test_times_and_steps_are_read_wherever_the_answer_has_them(open_page: Open, server: StandIn, is_flat: bool) -> None:
    server.is_flat = is_flat
    page = open_page()
    draw_to_the_end(page)
    gated = side(page, "T-GATE")
    assert re.findall(r"[\w-]+ \d\.\d+ s", " ".join(gated.locator(".times div").all_inner_texts()).replace("\n", " ")) == [
        "queue 0.004 s",
        "planning 0.18 s",
        "hand-off 0.001 s",
        "fidelity 0.14 s",
        "decoding 0.012 s",
    ]
    assert letters(gated) == "P" * 10 + "F" * 15
    expect(gated.get_by_role("list", name="Steps of T-GATE: 10 planning, 15 fidelity").get_by_role("listitem")).to_have_count(25)
    expect(gated.get_by_role("listitem").nth(10)).to_have_text("FStep 11: fidelity")
    expect(gated.locator(".strip-note")).to_be_hidden()
    expect(gated.get_by_role("link", name="Save T-GATE’s picture")).to_have_attribute("download", "t-gate-1.png")


def test_every_phase_has_a_colour_and_a_letter_of_its_own(open_page: Open, server: StandIn) -> None:
    server.phases = ["planning", "forecast", "reuse", "fidelity", "novel"]
    page = open_page()
    draw_to_the_end(page)
    cells = side(page, "T-GATE").locator(".strip .cell")
    assert letters(side(page, "T-GATE")) == "P~RF?"
    looks = {cell.evaluate("cell => getComputedStyle(cell).backgroundColor + getComputedStyle(cell).border") for cell in cells.all()[:4]}
    assert len(looks) == 4
    expect(page.get_by_role("list", name="Phases of the steps").get_by_role("listitem")).to_have_count(4)


def test_counts_without_an_order_are_shown_as_such(open_page: Open, server: StandIn) -> None:
    server.phases, server.is_flat = ["planning", "forecast"] * 4, True
    page = open_page()
    draw_to_the_end(page)
    assert letters(side(page, "T-GATE")) == "PPPP~~~~"
    expect(side(page, "T-GATE").locator(".strip-note")).to_be_visible()


def test_pictures_arrive_step_by_step(open_page: Open, server: StandIn) -> None:
    server.holds_before = 1
    page = open_page()
    draw(page)
    vanilla = side(page, "Vanilla")
    expect(vanilla.locator(".state")).to_have_text("Draws: partial picture 1 of 3")
    expect(page.get_by_role("img", name=f"Vanilla, {PROMPTS[0]}, not finished")).to_be_visible()
    expect(vanilla.get_by_role("progressbar", name="Progress of Vanilla")).to_have_js_property("position", 0.25)
    expect(vanilla.locator(".cell:not(.hollow)")).to_have_count(6)
    expect(side(page, "T-GATE").locator(".state")).to_have_text("Waits for its turn")
    first = vanilla.get_by_role("img").get_attribute("src")
    server.released.set()
    expect(page.locator("#status")).to_contain_text("Done.")
    assert vanilla.get_by_role("img").get_attribute("src") != first
    expect(vanilla.locator(".cell.hollow")).to_have_count(0)


def test_both_at_once_where_it_is_asked_for(open_page: Open, server: StandIn) -> None:
    server.holds_before = 1
    page = open_page()
    page.get_by_label("Draw both at once").check()
    draw(page)
    for name in ("Vanilla", "T-GATE"):
        expect(side(page, name).locator(".state")).to_contain_text("partial picture 1")
    server.released.set()
    expect(page.locator("#status")).to_contain_text("They were drawn at once")
    assert server.most_at_once == 2


@pytest.mark.parametrize("together", [False, True])
def test_cancel_ends_the_request(open_page: Open, server: StandIn, together: bool) -> None:
    server.holds_before = 1
    page = open_page()
    page.get_by_label("Draw both at once").set_checked(together)
    expect(page.get_by_role("button", name="Cancel")).to_be_disabled()
    draw(page)
    expect(side(page, "Vanilla").locator(".state")).to_contain_text("partial picture 1")
    page.get_by_role("button", name="Draw both").click(force=True)  # has no effect while it draws
    page.get_by_role("button", name="Cancel").click()
    assert server.gone.wait(5)
    expect(page.locator("#status")).to_have_text("Cancelled.")
    expect(side(page, "Vanilla").locator(".state")).to_have_text("Cancelled")
    expect(side(page, "T-GATE").locator(".state")).to_have_text("Cancelled" if together else "Not drawn")
    expect(page.get_by_role("button", name="Draw both")).to_be_focused()
    expect(page.get_by_role("alert")).to_be_empty()
    assert len(server.drawn) == (2 if together else 1)
    server.released.set()
    draw_to_the_end(page)


def test_a_full_queue_says_when_to_try_again(open_page: Open, server: StandIn, complaints: list[str]) -> None:
    server.refusal = Refusal(429, "4 pictures wait already", headers={"retry-after": "3"})
    page = open_page()
    draw(page)
    expect(page.get_by_role("alert")).to_have_text("4 pictures wait already. Try again in 3 seconds.")
    expect(side(page, "Vanilla").locator(".state")).to_have_text("Failed")
    expect(side(page, "T-GATE").locator(".state")).to_have_text("Not drawn")
    assert len(server.drawn) == 1
    server.refusal = None
    draw_to_the_end(page)
    expect(page.get_by_role("alert")).to_be_empty()
    assert [text.startswith(EXPECTED_COMPLAINT) for text in complaints] == [True]
    complaints.clear()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("fails_after", "The server failed to draw; its log says why."),
        ("ends_after", "The server ended its answer before the picture was finished. Draw again."),
    ],
)
def test_a_stream_that_fails(open_page: Open, server: StandIn, how: str, words: str) -> None:
    setattr(server, how, 2)
    page = open_page()
    draw(page)
    expect(page.get_by_role("alert")).to_have_text(words)
    expect(page.get_by_role("img", name=f"Vanilla, {PROMPTS[0]}, not finished")).to_be_visible()
    expect(side(page, "Vanilla").locator(".state")).to_have_text("Failed")
    assert announced(page) == ["Drawing vanilla and T-GATE with gate 10.", words]
    expect(page.locator("#history")).to_be_hidden()


def test_a_server_that_cannot_be_reached(open_page: Open, complaints: list[str]) -> None:
    page = open_page()
    page.route("**/v1/images/generations", lambda route: route.abort())
    draw(page)
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Check that it runs, then draw again.")
    complaints.clear()


@pytest.mark.parametrize(
    ("param", "label"), [("prompt", "Prompt"), ("guidance_scale", "Guidance scale"), ("gate", "Gate"), ("num_inference_steps", "Steps")]
)
def test_an_impossible_value_is_marked(open_page: Open, server: StandIn, complaints: list[str], param: str, label: str) -> None:
    server.refusal = Refusal(400, "this is impossible; choose another", param)
    page = open_page()
    draw(page)
    control = page.get_by_label(label, exact=True)
    expect(control).to_be_focused()
    expect(control).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".field", has=control).get_by_role("alert")).to_have_text("This is impossible; choose another.")
    assert announced(page)[1:] == ["This is impossible; choose another."]
    complaints.clear()


def test_what_the_form_cannot_take_is_not_sent(open_page: Open, server: StandIn) -> None:
    page = open_page()
    page.locator("summary", has_text="More settings").click()
    page.get_by_label("Guidance scale").fill("1000")
    page.locator("summary", has_text="More settings").click()
    draw(page)
    expect(page.get_by_label("Guidance scale")).to_be_visible()
    page.get_by_label("Guidance scale").fill("2.5")
    page.get_by_label("Prompt", exact=True).fill("")
    draw(page)
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    assert server.drawn == []


def test_a_key_stays_in_memory(open_page: Open, server: StandIn, complaints: list[str]) -> None:
    server.key = "secret-key"
    page = open_page(is_ready=False)
    field = page.get_by_label("API key, if the server asks for one")
    expect(field).to_be_focused()
    expect(page.get_by_role("alert")).to_contain_text("needs an API key")
    field.fill("secret-key")
    field.press("Tab")
    expect(page.get_by_label("Model")).to_have_value(NESTED["id"])
    expect(page.get_by_role("alert")).to_be_empty()
    draw_to_the_end(page)
    assert [asked.headers["authorization"] for asked in server.asked if asked.method == "POST"] == ["Bearer secret-key"] * 2
    kept = page.evaluate("JSON.stringify([location.href, document.cookie, {...localStorage}, {...sessionStorage}, history.state])")
    assert "secret-key" not in kept
    expect(field).to_have_attribute("type", "password")
    complaints.clear()


def test_the_gate_is_spoken(open_page: Open) -> None:
    page = open_page()
    gate = page.get_by_role("slider", name="Gate")
    expect(gate).to_have_attribute("aria-valuetext", "10 of 25: 10 planning steps, then 15 fidelity steps")
    gate.press("End")
    expect(gate).to_have_attribute("aria-valuetext", "25 of 25: 25 planning steps, then 0 fidelity steps")
    gate.press("Home")
    expect(gate).to_have_attribute("aria-valuetext", "1 of 25: 1 planning step, then 24 fidelity steps")
    expect(page.locator("#gate-output")).to_have_text("1 of 25")
    gate.press("End")
    page.get_by_label("Steps", exact=True).fill("12")
    page.get_by_label("Steps", exact=True).press("Tab")
    expect(gate).to_have_attribute("aria-valuetext", "12 of 12: 12 planning steps, then 0 fidelity steps")


def test_a_model_gives_the_form_its_values(open_page: Open, server: StandIn) -> None:
    page = open_page()
    page.get_by_role("button", name=PROMPTS[1]).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(PROMPTS[1])
    page.get_by_label("Model").select_option("portraits-128x192-fp16")
    expect(page.get_by_label("Steps", exact=True)).to_have_value("20")
    expect(page.get_by_role("slider", name="Gate")).to_have_value("5")
    expect(page.get_by_role("group", name="Suggested prompts")).to_be_hidden()
    box = side(page, "Vanilla").locator(".frame").bounding_box()
    assert box is not None and box["height"] / box["width"] == pytest.approx(1.5, abs=0.02)
    assert page.locator("#gates option").evaluate_all("options => options.map((option) => option.value)") == ["0.25", "tuned"]


def test_a_whole_gate_stands_in_for_the_slider(open_page: Open, server: StandIn) -> None:
    page = open_page()
    page.locator("summary", has_text="More settings").click()
    page.get_by_label("Gate as text").fill("noise:1.35")
    page.get_by_label("After the gate").select_option("fading")
    page.get_by_label("Negative prompt").fill("blur")
    page.get_by_label("Guidance scale").fill("2.5")
    expect(page.get_by_role("slider", name="Gate")).to_be_disabled()
    draw_to_the_end(page)
    assert server.drawn[1]["gate"] == "noise:1.35"
    assert server.drawn[1]["after_gate"] == "fading"
    for body in server.drawn:
        assert (body["negative_prompt"], body["guidance_scale"]) == ("blur", 2.5)


def test_earlier_pairs_come_back(open_page: Open, server: StandIn) -> None:
    page = open_page()
    draw_to_the_end(page)
    first = side(page, "T-GATE").get_by_role("img").get_attribute("src")
    page.get_by_role("button", name="Choose a random seed").click()
    seed = page.get_by_label("Seed", exact=True).input_value()
    assert seed != "1" and seed.isdecimal()
    for number in range(2, 9):
        draw(page)
        expect(page.locator("#history-list li")).to_have_count(min(number, 6))
        expect(page.locator("#cancel")).to_be_disabled()
        if number == 2:
            page.locator("#history-list button").nth(1).click()
            assert side(page, "T-GATE").get_by_role("img").get_attribute("src") == first
            expect(page.get_by_label("Seed", exact=True)).to_have_value("1")
            expect(page.locator("#status")).to_contain_text("An earlier pair.")


def test_start_and_end_are_announced_once(open_page: Open) -> None:
    page = open_page()
    draw_to_the_end(page)
    assert announced(page) == [
        "Drawing vanilla and T-GATE with gate 10.",
        "Done. Vanilla took 0.46 s, T-GATE 0.33 s: 0.71 of vanilla’s time.",
    ]


def test_the_keyboard_suffices(open_page: Open, server: StandIn) -> None:
    page = open_page()
    server.holds_before = 1
    seen: list[str] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        focus = page.evaluate(FOCUS)
        assert focus[1] != "none" and focus[2] >= 2 and focus[3], focus
        seen.append(focus[0])
        if focus[0] == "prompt":
            page.keyboard.press("Control+A")
            page.keyboard.type("typed")
        elif focus[0] == "gate":
            page.keyboard.press("ArrowLeft")
        elif focus[0] == "More settings":
            page.keyboard.press("Enter")
        elif focus[0] == "draw":
            break
    assert seen == [
        "Skip to the pictures", "model", "prompt", *PROMPTS, "gate", "seed", "die", "steps", "More settings", "guidance", "negative",
        "after-gate", "whole-gate", "API key", "together", "draw",
    ]  # fmt: skip
    page.keyboard.press("Enter")
    expect(side(page, "Vanilla").locator(".state")).to_contain_text("partial picture 1")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator("#status")).to_have_text("Cancelled.")
    server.released.set()
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done.")
    assert (server.drawn[-1]["prompt"], server.drawn[-1]["gate"]) == ("typed", "9")


@pytest.mark.parametrize("width", [320, 400])
def test_a_narrow_window_does_not_scroll_sideways(open_page: Open, server: StandIn, complaints: list[str], width: int) -> None:
    page = open_page((width, 800))
    page.locator("summary", has_text="More settings").click()
    page.locator("summary", has_text="API key").click()
    page.get_by_label("Prompt", exact=True).fill("unbreakable" * 30)
    page.get_by_label("Steps", exact=True).fill("200")
    draw_to_the_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tops = [side(page, name).evaluate("figure => figure.getBoundingClientRect().top") for name in ("Vanilla", "T-GATE")]
    assert tops[0] < tops[1]
    assert page.get_by_role("heading", name="Pictures").evaluate("e => e.getBoundingClientRect().top") < 800
    expect(page.get_by_role("button", name="Cancel")).to_be_in_viewport()
    server.refusal = Refusal(500, "unbreakable" * 30)
    draw(page)
    expect(page.get_by_role("alert")).to_contain_text("Unbreakable")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    complaints.clear()


def test_a_wide_window_has_both_side_by_side(open_page: Open) -> None:
    page = open_page()
    boxes = [side(page, name).bounding_box() for name in ("Vanilla", "T-GATE")]
    assert boxes[0] is not None and boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]


def test_the_colour_scheme_is_the_users(open_page: Open) -> None:
    grounds = [open_page(scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in ("light", "dark")]
    light, dark = (sum(map(int, re.findall(r"\d+", ground)[:3])) / 3 for ground in grounds)
    assert light > 230 and dark < 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_suffices(open_page: Open, server: StandIn, complaints: list[str], scheme: Scheme) -> None:
    page = open_page(scheme=scheme, reduced_motion="reduce")
    page.locator("summary", has_text="More settings").click()
    page.locator("summary", has_text="API key").click()
    server.phases = ["planning", "forecast", "reuse", "fidelity"]
    draw_to_the_end(page)
    found = page.evaluate(CONTRASTS)
    server.fails_after = server.holds_before = 1
    draw(page)
    expect(side(page, "Vanilla").locator(".state")).to_contain_text("partial picture 1")
    found += page.evaluate(CONTRASTS)
    server.released.set()
    expect(page.get_by_role("alert")).not_to_be_empty()
    found += page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [one for one in found if one["ratio"] < one["least"]] == []


def test_reduced_motion_is_respected(open_page: Open) -> None:
    moving = """() => [...document.querySelectorAll('*')].filter((element) => {
      const style = getComputedStyle(element);
      return parseFloat(style.transitionDuration) > 0 || style.animationName !== 'none';
    }).length"""
    assert open_page(reduced_motion="reduce").evaluate(moving) == 0


def test_everything_has_a_name_and_a_place(open_page: Open) -> None:
    page = open_page()
    draw_to_the_end(page)
    problems = page.evaluate("""() => {
      const all = (selector) => [...document.querySelectorAll(selector)];
      const named = (e) => e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.textContent.trim();
      const ids = all('[id]').map((e) => e.id);
      const referring = ['for', 'aria-labelledby', 'aria-describedby', 'aria-errormessage', 'list', 'form'];
      const missing = referring.flatMap((name) => all(`[${name}]`).flatMap((e) => e.getAttribute(name).split(' ')));
      const levels = all('h1, h2, h3').map((e) => Number(e.tagName[1]));
      const small = (e) => e.checkVisibility() && e.getBoundingClientRect().height < 24;
      return {
        unnamed: all('button, input, select, textarea, progress, figure, section, form, summary, a').filter((e) => !named(e)),
        withoutAlt: all('img:not([alt])'),
        twice: ids.filter((id, index) => ids.indexOf(id) !== index),
        missing: missing.filter((id) => !ids.includes(id)),
        jumps: levels.filter((level, index) => level - (levels[index - 1] ?? 0) > 1),
        small: all('button, input:not([type=checkbox]), select, textarea, summary').filter(small).map((e) => e.outerHTML),
        inline: all('[style]:not(.strip, .segment, .frame), script:not([src]), style'),
        ahead: all('[tabindex]').filter((e) => e.tabIndex > 0),
      };
    }""")
    assert {what: found for what, found in problems.items() if found} == {}
    for landmark in ("banner", "main"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.title()


def test_the_files_name_no_address_outside() -> None:
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//\w+\.", text), path.name
