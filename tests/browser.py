"""Pages in a real browser: headless Chromium, spoken to over its DevTools pipe, where there is one."""

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium-headless-shell", "chromium", "google-chrome") if (found := shutil.which(name))), None
)
# Width, height and scheme of the windows that every page is looked at in.
WINDOWS = [(320, 640, "light"), (360, 740, "light"), (360, 740, "dark"), (1280, 900, "light"), (1280, 900, "dark")]


class Browser:
    """One page of a headless Chromium, spoken to over its DevTools pipe; what it says meanwhile is kept."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        to_it, from_us = os.pipe()
        to_us, from_it = os.pipe()
        # Chromium reads its pipe at 3 and writes at 4; a shell that takes large numbers lays them there.
        command = f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "about:blank"],
            pass_fds=(to_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_it), os.close(from_it)
        self.reads, self.writes = os.fdopen(to_us, "rb"), os.fdopen(from_us, "wb")
        self.numbers, self.rest, self.events, self.session = itertools.count(1), b"", [], {}
        targets = self.ask("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self.session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | self.session
        self.writes.write(json.dumps(message).encode() + b"\0")
        self.writes.flush()
        while (said := self._next()).get("id") != number:
            self.events.append(said)
        assert "error" not in said, said
        return dict(said["result"])

    def wait(self, method: str) -> None:
        """Until an event of that name came."""
        while not any(each.get("method") == method for each in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.reads.fileno(), 1 << 20)
            assert part, "Chromium ended"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return dict(json.loads(message))

    def evaluate(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def show(self, path: Path, *, width: int, height: int, scheme: str) -> None:
        """Open a file in a window of that size."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events = []
        self.ask("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def complaints(self) -> list[dict[str, Any]]:
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")
        return [each for each in self.events if each.get("method") in kinds]

    def requests(self) -> list[str]:
        return [
            each["params"]["request"]["url"]
            for each in self.events
            if each.get("method") == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        said = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(said["data"]))

    def close(self) -> None:
        self.ask("Browser.close")
        self.process.wait(60)
        self.reads.close(), self.writes.close()


LOOK = """(() => {
  const inside = element => element.closest('.scroll') !== null;
  const wide = [...document.body.querySelectorAll('*')].filter(e => !inside(e) && !e.closest('svg'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80));
  const channel = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = s => {
    const [r, g, b] = s.match(/[\\d.]+/g).map(v => channel(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const card = getComputedStyle(document.querySelector('.card')).backgroundColor;
  const faint = [...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill).filter(fill => {
    const [a, b] = [light(fill), light(card)].sort((x, y) => y - x);
    return (a + .05) / (b + .05) < 4.5;
  });
  return {
    width: document.documentElement.scrollWidth, inner: innerWidth, wide, faint,
    paper: getComputedStyle(document.body).backgroundColor,
    pictures: [...document.querySelectorAll('svg')].map(svg => {
      const box = svg.getBoundingClientRect();
      const drawn = svg.getBBox();
      const letters = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect())
        .every(t => t.width > 0 && t.left >= box.left - 1 && t.right <= box.right + 1
          && t.top >= box.top - 1 && t.bottom <= box.bottom + 1);
      return { width: box.width, height: box.height, drawn: drawn.width * drawn.height, letters,
               title: svg.getAttribute('aria-label') };
    }),
  };
})()"""


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, or a skipped test."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium-headless-shell")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def see(browser: Browser, tmp_path: Path) -> Callable[[Path, str], list[dict[str, Any]]]:
    """Looks at a page in every window: nothing is complained of or fetched, nothing sticks out, every picture is seen.

    Returns the pictures; screenshots of the name go to $QUANTKIT_SCREENSHOTS.
    """

    def look(path: Path, name: str) -> list[dict[str, Any]]:
        shots = Path(os.environ.get("QUANTKIT_SCREENSHOTS", tmp_path))
        shots.mkdir(parents=True, exist_ok=True)
        pictures: list[dict[str, Any]] = []
        for width, height, scheme in WINDOWS:
            browser.show(path, width=width, height=height, scheme=scheme)
            seen = browser.evaluate(LOOK)
            browser.screenshot(shots / f"{name}-{width}-{scheme}.png")
            assert browser.complaints() == []
            assert browser.requests() == [path.as_uri()]
            assert seen["inner"] == width and seen["width"] <= width, seen["wide"]
            assert seen["wide"] == [] and seen["faint"] == []
            assert (seen["paper"] == "rgb(16, 19, 22)") == (scheme == "dark")
            pictures = seen["pictures"]
            for picture in pictures:
                assert picture["width"] > 200 and picture["height"] > 80 and picture["drawn"] > 0, picture["title"]
                assert picture["letters"], f"letters of {picture['title']!r} run out of the picture"
        return pictures

    return look
