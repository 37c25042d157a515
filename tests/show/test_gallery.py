from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from support.models import TINY_PIXELS

HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture
def page(cli, tiny, tmp_path):
    """Attack three photos, one with a hostile name, and a file that is not a photo; return the page."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(("a", HOSTILE.replace("/", ""), "javascript:alert(1)")):
        Image.fromarray(np.roll(TINY_PIXELS, number, 1)).save(photos / f"{name}.png")
    (photos / "broken.png").write_bytes(b"nonsense")
    code, text, err = cli("attack", photos, "--flip", "cat", "--keep", "rest", "--budget", "fast", "--html",
                          "--checkpoint", tiny, "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert code == 1, err
    assert "index.html" in text
    path = tmp_path / "out" / "report.json"
    path.write_text(path.read_text().replace('"dog"', '"</script><script>document.title=2</script>"'))
    return tmp_path / "out" / "index.html"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_whole_in_one_file_and_escapes_names(page):
    text = page.read_text()
    tags = Tags(text).tags
    assert sum(tag == "article" for tag, _ in tags) == 4
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == 9
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not any("onerror" in attributes for _, attributes in tags)
    links = [attributes["href"] for tag, attributes in tags if tag == "a"]
    assert len(links) == 6
    assert all(link.startswith("./") for link in links)
    assert not re.search(r"https?://", text)
    assert "Content-Security-Policy" in text
    assert "no regular" not in text
    assert "broken.png" in text
    assert "not an image of a known format" in text


def test_gallery_makes_the_page_again_from_the_report_alone(cli, page):
    first = page.read_text()
    code, _, err = cli("gallery", page.parent)
    assert code == 2
    assert "--overwrite" in err
    code, text, _ = cli("gallery", page.parent, "--overwrite", "--quiet")
    assert (code, text) == (0, "")
    assert first.count("<article") == page.read_text().count("<article")
    assert "<script>document" not in page.read_text()
    (page.parent / "a.adv.png").unlink()
    code, _, err = cli("gallery", page.parent / "report.json", "--out", page.parent / "sub" / "page.html", "--quiet")
    assert code == 1
    assert "a.adv.png" in err
    text = (page.parent / "sub" / "page.html").read_text()
    links = [attributes["href"] for tag, attributes in Tags(text).tags if tag == "a"]
    assert len(links) == 5
    assert all(link.startswith("./../") for link in links)


def test_the_page_replaces_no_report_and_no_picture(cli, page):
    for name in ("report.json", "a.adv.png"):
        before = (page.parent / name).read_bytes()
        code, _, err = cli("gallery", page.parent, "--out", page.parent / name, "--overwrite")
        assert code == 2
        assert ".html" in err
        assert (page.parent / name).read_bytes() == before


def test_another_photo_of_the_same_name_is_not_shown(cli, page, tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(tmp_path / "photos" / "a.png")
    assert cli("gallery", page.parent, "--overwrite", "--quiet")[0] == 0
    assert page.read_text().count("the photo is gone") == 1


def test_a_file_name_that_is_no_utf_8_is_shown_escaped(cli, page):
    path = page.parent / "report.json"
    report = json.loads(path.read_text())
    report["images"][0]["source"] = "bad\udcff.png"
    path.write_text(json.dumps(report))
    assert cli("gallery", page.parent, "--overwrite", "--quiet")[0] == 0
    assert "bad\\udcff.png" in page.read_text()


def test_control_characters_of_names_are_shown_as_escapes(cli, page):
    path = page.parent / "report.json"
    odd = "\x00\x1b[31m\u202e"
    path.write_text(path.read_text().replace('"cat"', json.dumps("cat" + odd)))
    report = json.loads(path.read_text())
    report["settings"]["method"] += odd
    report["images"][0] |= {"error": {"type": "X", "message": "why" + odd}}
    path.write_text(json.dumps(report))
    assert cli("gallery", page.parent, "--overwrite", "--quiet")[0] == 0
    text = page.read_text()
    assert [character for character in text if not character.isprintable() and character != "\n"] == []
    assert all(f"{word}\\x00\\x1b[31m\\u202e" in text for word in ("cat", "why", "ml-ddn"))


@pytest.mark.parametrize("damage", [("images", 5), ("images", [{}]), ("classifier", None), ("summary", {})])
def test_a_damaged_report_is_refused_in_a_line(cli, page, damage):
    path = page.parent / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), damage[0]: damage[1]}))
    for command in (("gallery", path, "--overwrite"), ("figures", path), ("jpeg-defend", path, "--device", "cpu")):
        if damage[0] == "summary" and command[0] != "gallery":
            continue  # which they do not read
        code, _, err = cli(*command)
        assert code == 2
        assert "does not follow its schema" in err
        assert err.count("\n") == 1


def test_a_card_says_why_an_attack_fell_short(cli, page):
    path = page.parent / "report.json"
    report = json.loads(path.read_text())
    image = report["images"][0]
    image |= {"status": "failed", "files": {"adversarial": None, "map": None}, "distortion": None,
              "constraints": {"held": 2, "total": 4, "violated": ["cat", "hen"]}, "readers": None}  # fmt: skip
    path.write_text(json.dumps(report))
    assert cli("gallery", page.parent, "--overwrite", "--quiet")[0] == 0
    reason = "2 of 4 constraints not met: cat, hen; no label flipped, so no file was written."
    assert page.read_text().count(reason) == 1


def test_a_long_report_has_pages_that_lead_to_each_other(cli, page, monkeypatch):
    import mlperturb.run.outputs
    import mlperturb.show.gallery

    for module in (mlperturb.run.outputs, mlperturb.show.gallery):
        monkeypatch.setattr(module, "PHOTOS", 3)
    code, text, _ = cli("gallery", page.parent, "--out", page.parent / "all.html")
    assert (code, text) == (0, f"page {page.parent / 'all.html'} to all-2.html\n")
    first, second = (page.with_name(name).read_text() for name in ("all.html", "all-2.html"))
    assert (first.count("<article"), second.count("<article")) == (3, 1)
    assert "Photos 1 to 3 of 4; page" in first
    assert "Photos 4 to 4 of 4; page" in second
    assert next(dict(tag)["href"] for name, tag in Tags(second).tags if name == "a") == "./all.html"
    assert '<a href="./all-2.html">2</a>' in first
    assert "<option>unreadable" not in first.replace("\n", "") or "<option>unreadable" not in second.replace("\n", "")
    code, _, err = cli("gallery", page.parent, "--out", page.parent / "all.html")
    assert (code, "all.html exists already" in err) == (2, True)
    page.with_name("all.html").unlink()
    assert "all-2.html exists already" in cli("gallery", page.parent, "--out", page.parent / "all.html")[2]


@pytest.fixture
def browser():
    """Start a headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "window-size=420,900",
                     "disable-background-networking", "disable-component-update", "disable-sync"):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.mark.browser
def test_the_page_filters_sorts_and_compares_and_names_do_nothing(cli, page, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    assert cli("gallery", page.parent, "--overwrite", "--quiet")[0] == 0
    browser.get(page.as_uri())

    def shown() -> list[str]:
        return [card.get_attribute("data-number") for card in browser.find_elements(By.CSS_SELECTOR, ".card")
                if card.is_displayed()]  # fmt: skip

    def choose(name: str, value: str) -> None:
        Select(browser.find_element(By.ID, name)).select_by_visible_text(value)

    assert browser.title.startswith("mlperturb")
    assert browser.get_log("browser") == []
    assert len(shown()) == 4
    choose("status", "unreadable")
    assert len(shown()) == 1
    assert browser.find_element(By.ID, "count").text == "1 shown"
    choose("status", "all")
    choose("label", "cat")
    assert len(shown()) == 3
    choose("label", "all")
    images = json.loads((page.parent / "report.json").read_text())["images"]
    sizes = {str(number): image["distortion"]["rmsd"] for number, image in enumerate(images) if image["distortion"]}
    choose("sort", "least RMSD first")
    assert shown()[:3] == sorted(sizes, key=sizes.get)
    assert len(shown()) == 4
    choose("sort", "largest RMSD first")
    assert shown()[:3] == sorted(sizes, key=sizes.get, reverse=True)
    choose("sort", "order of the report")
    assert shown() == ["0", "1", "2", "3"]
    slider = browser.find_element(By.CSS_SELECTOR, ".slider")
    over = browser.find_element(By.CSS_SELECTOR, ".over")
    before = over.value_of_css_property("clip-path")
    slider.send_keys(Keys.ARROW_RIGHT)  # with the keyboard
    assert over.value_of_css_property("clip-path") != before
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")  # on a phone
    assert browser.title.startswith("mlperturb")
    assert browser.get_log("browser") == []
