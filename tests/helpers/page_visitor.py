"""Somebody in front of the server's page: what the stand-in for the model says there, and what is done in a browser."""
from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import expect
from served import IMAGES

# clip.webm is a second of red and blue as a browser's MediaRecorder writes it, which says no length. It is stored:
# one recorded by a test has as few frames as a busy machine comes to.
DATA = Path(__file__).parents[1] / "data"

TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".mp4": "video/mp4", ".webm": "video/webm"}

# Milliseconds until something of the page must be there that comes at once unless the machine is busy.
WAIT_MS = 120_000
expect.set_options(timeout=WAIT_MS)

# Where pictures of the page are kept, if anywhere.
SHOTS = os.environ.get("MINDFORMERS_IXC_SCREENSHOTS")

# A page as a model writes it, with a script that tries what it can reach.
WEB = """```html
<!doctype html>
<html lang="en"><head><title>Tides</title>
<style>
body { margin: 0; font-family: Georgia, serif }
header { background: #1d4e6f; color: #fff; padding: 2rem }
main { padding: 2rem; display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
</style>
<link rel="stylesheet" href="https://styles.example.org/all.css">
<script src="//scripts.example.org/a.js"></script></head>
<body><header><h1>Harbour Institute</h1>
<p>Coasts, tides, and who lives with them. <a href="#end">Contact</a></p></header>
<main><section><h2>Tides</h2><p id="said">no script has run</p></section>
<section><h2>Dunes</h2><img src="dune.jpg" alt="A dune">
<button onclick="this.textContent = 'pressed'">Press</button></section></main>
<div style="height: 90rem"></div><p id="end">The end</p>
<script>
let said = "a script has run";
try { said += parent.document.title; } catch { said += ", alone"; }
try { localStorage.length; } catch { said += ", without storage"; }
document.getElementById("said").textContent = said;
fetch("v1/models").catch(() => { document.getElementById("said").textContent += ", without network"; });
new Image().src = "https://elsewhere.example.org/told";
</script></body></html>
```"""

# A page that would tell elsewhere what it knows.
LEAVING = """<!doctype html><html><body onload="leave()"><h1>Stay</h1><script>
function leave() {
  try { top.location = "https://top.example.org/"; } catch {}
  try { open("https://window.example.org/"); } catch {}
  try { parent.postMessage({ error: "told" }, "*"); } catch {}
  setTimeout(() => { document.title = "tried"; location = "https://frame.example.org/"; }, 100);
}
</script></body></html>"""

# Reads the store, which waits for what is being written.
WRITTEN = """() => new Promise((done) => {
  const opening = indexedDB.open("mindformers_ixc");
  opening.onsuccess = () => {
    opening.result.transaction("conversations").objectStore("conversations").count().onsuccess = () => {
      opening.result.close();
      done();
    };
  };
})"""

RICH = """The first shows a **cat**, the second a *rocket*.

| picture | what |
|---|---:|
| 1 | a cat |
| 2 | a rocket |

1. Green eyes.
2. On its pad:
   - a tower beside it

```python
print("cat" < "rocket")
```"""


def answer(mode: str, asked: str) -> str:
    """What the stand-in says: by the last question."""
    last = asked.rpartition("user\n")[2]
    if mode == "web":
        return LEAVING if "leave" in last else "<!doctype html><h1>Small</h1>" if "small" in last else WEB
    if "long" in last:
        return "word after word " * 200
    if "markup" in last:
        return ('<img src=x onerror="document.title=1"> <b>bold</b> <script>document.title = 2</script> '
                "[a](javascript:alert(1))")
    if "rounds" in last:
        return f"Questions so far: {asked.count('user')}."
    return RICH if "two" in last else "A cat."


class Visitor:
    """Somebody in front of the page.

    Attributes:
        asked: bodies of the requests for answers.
        elsewhere: addresses of other servers that were asked for.
        errors: of the page's program and its policy.
        expected: pattern of those that a test provokes, however late they are told; "" for none.
    """

    def __init__(self, browser, url: str, width: int = 1280, height: int = 800, **options):
        options = {"locale": "en-GB", "viewport": {"width": width, "height": height}, **options}
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(WAIT_MS)
        self.page, self.url = self.context.new_page(), url
        self.asked, self.elsewhere, self.errors, self.expected = [], [], [], ""
        self.page.on("request", self._noted)
        self.page.on("requestfailed", self._failed)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.open()

    def _noted(self, request):
        if request.url.endswith("/v1/chat/completions"):
            self.asked.append(request.post_data_json)
        if not request.url.startswith((self.url, "data:", "blob:", "about:")):
            self.elsewhere.append(request.url)

    def _failed(self, request):
        if request.failure == "csp":        # forbidden by the policy: nothing has left the browser
            self.elsewhere.remove(request.url)

    def open(self):
        self.page.goto(self.url)
        expect(self.page.locator("#modes label")).to_have_count(3)

    def bring(self, kind: str, *names: str):
        """Drops or pastes files of the demo or of tests/data; one of another name holds nothing of use."""
        paths = [next((folder / name for folder in (IMAGES, DATA) if (folder / name).exists()), None) for name in names]
        files = [[name, base64.b64encode(path.read_bytes() if path else b"x").decode(),
                  TYPES.get(Path(name).suffix, "text/plain")] for name, path in zip(names, paths, strict=True)]
        self.page.evaluate("""([kind, files]) => {
          const held = new DataTransfer();
          for (const [name, text, type] of files)
            held.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, { type }));
          if (kind === "paste")
            return document.body.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, clipboardData: held }));
          for (const one of ["dragenter", "dragover", "drop"])
            document.body.dispatchEvent(new DragEvent(one, { bubbles: true, cancelable: true, dataTransfer: held }));
        }""", [kind, files])

    def ask(self, text: str, wait: bool = True):
        self.page.fill("#question", text)
        self.page.keyboard.press("Enter")
        if wait:
            self.page.wait_for_selector(".answer:last-child:not(.running)")

    @property
    def unexpected(self) -> list[str]:
        """Errors that no test has provoked."""
        return [text for text in self.errors if not (self.expected and re.search(self.expected, text))]

    def until(self, happened: Callable[[], object]):
        """Waits for what the browser tells, or the server does, a little later."""
        for _ in range(WAIT_MS // 50):
            if happened():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"It has not happened. The page's errors: {self.errors}")

    def answers(self) -> list[str]:
        return self.page.locator(".answer .text").all_inner_texts()

    def shot(self, name: str):
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}.png")
