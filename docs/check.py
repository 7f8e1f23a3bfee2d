"""Open every page of the book in a browser: `python docs/check.py docs/build/html [--shots FOLDER] [PAGE ...]`.

Says which pages log an error, ask another machine for something, link into the void, show a formula that MathJax
refuses, a picture without a description, or are wider than a phone. Exit status 1 if there is any such page.
Needs Chromium: the system's (apt-get install chromium), or Playwright's (python -m playwright install chromium).
"""

import argparse
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from playwright.sync_api import Error, sync_playwright

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1400, "height": 900}

LOOK = """async () => {
  await window.MathJax?.startup?.promise;
  const hrefs = [...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href'));
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  const mute = [...document.images].filter(i => !i.alt && !i.closest('a')).map(i => i.src);
  const broken = [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src);
  const refused = [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent.slice(0, 80));
  const raw = [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length;
  const text = [...document.querySelectorAll('.bd-article p')].map(e => e.textContent);
  const flat = text.filter(t => /\\|[-—:]+\\||^#+ |\\*\\*\\w/.test(t)).map(t => t.slice(0, 60));
  return {flat, hrefs, ids, mute, broken, refused, raw};
}"""
WIDTH = "document.scrollingElement.scrollWidth"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def chromium(playwright):
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        return playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
    except Error as e:
        sys.exit(f"no Chromium here ({str(e).splitlines()[0]}): apt-get install chromium, or\n"
                 "python -m playwright install --with-deps chromium")  # fmt: skip


def visit(page, url: str, host: str) -> tuple[list[str], dict]:
    "Complaints about one page, and what was found on it."
    wrong = []
    listeners = {
        "console": lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None,
        "pageerror": lambda e: wrong.append(f"script: {e}"),
        "request": lambda r: (
            wrong.append(f"asks {r.url}") if urlsplit(r.url).netloc not in (host, "") else None
        ),
        "response": lambda r: wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.set_viewport_size(DESK)
    page.goto(url, wait_until="load")  # on a busy machine the network may rest before a long page is read
    page.wait_for_load_state("networkidle")
    found = page.evaluate(LOOK)
    page.set_viewport_size(PHONE)
    if (width := page.evaluate(WIDTH)) > PHONE["width"]:
        wrong.append(f"{width} pixels wide on a phone")
    wrong += [f"picture without a description: {src}" for src in found["mute"]]
    wrong += [f"picture that does not load: {src}" for src in found["broken"]]
    wrong += [f"MathJax refuses {text!r}" for text in found["refused"]]
    wrong += [f"Markdown that was not read as such: {text!r}" for text in found["flat"]]
    if found["raw"]:
        wrong.append(f"{found['raw']} formulas not set")
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    return wrong, found


def dead_links(pages: dict[str, dict], root: Path, base: str) -> list[str]:
    "Links that lead to no page of the book, or to no place on it."
    dead = []
    for name, found in pages.items():
        for href in set(found["hrefs"]):
            target, anchor = urldefrag(urljoin(base + name, href))
            if not target.startswith(base):
                continue
            place = unquote(target.removeprefix(base)) or "index.html"
            if not (root / place).is_file():
                dead.append(f"{name}: no file for {href}")
            elif anchor and place in pages and unquote(anchor) not in pages[place]["ids"]:
                dead.append(f"{name}: no place for {href}")
    return dead


def search_works(page, base: str) -> list[str]:
    page.goto(f"{base}search.html?q=rotary", wait_until="networkidle")
    page.wait_for_timeout(1000)
    hits = page.locator("#search-results li").count()
    return [] if hits else ["search.html: nothing found for 'rotary'"]


def shoot(page, url: str, name: str, folder: Path) -> None:
    "Pictures of the whole page, light and dark, at the width of a phone and of a desk."
    for theme in "light", "dark":
        page.add_init_script(
            f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')"
        )
        for kind, size in ("phone", PHONE), ("desk", DESK):
            page.set_viewport_size(size)
            page.goto(url, wait_until="networkidle")
            page.evaluate(LOOK)
            height = min(15000, page.evaluate("document.scrollingElement.scrollHeight"))
            page.set_viewport_size({**size, "height": height})
            page.screenshot(path=folder / f"{name}-{theme}-{kind}.png")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path, help="folder of the built book")
    parser.add_argument("pages", nargs="*", help="these pages only, such as notes/n1_gpus.html")
    parser.add_argument("--shots", type=Path, help="folder for pictures of each page")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    base = f"http://{host}/"
    every = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.html") if "_static" not in p.parts)
    names = arguments.pages or every
    count = 0
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        page, pages = browser.new_page(), {}
        for name in names:
            wrong, pages[name] = visit(page, base + name, host)
            count += len(wrong)
            print(f"{name}: {'ok' if not wrong else len(wrong)}", *wrong, sep="\n  ", flush=True)
            if arguments.shots:
                arguments.shots.mkdir(parents=True, exist_ok=True)
                tab = browser.new_context().new_page()
                shoot(tab, base + name, name.replace("/", "-").removesuffix(".html"), arguments.shots)
                tab.context.close()
        rest = dead_links(pages, root, base) + ([] if arguments.pages else search_works(page, base))
        print(*rest, sep="\n")
        browser.close()
    server.shutdown()
    print(f"{len(names)} pages, {count + len(rest)} complaints")
    return min(1, count + len(rest))


if __name__ == "__main__":
    sys.exit(main())
