"""TensorBoard's real server, opened in a real headless browser.

Needs Debian's chromium and chromium-driver, and selenium and pillow of the extra `test`.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHROMIUM, _DRIVER = "chromium", "chromedriver"
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--enable-unsafe-swiftshader"),
)
# TensorBoard's pages are web components: their elements are in nested shadow roots.
_PAGE_CONTENT = """
function below(root, found) {
  for (const element of root.querySelectorAll('*')) {
    found.push(element);
    if (element.shadowRoot) below(element.shadowRoot, found);
  }
  return found;
}
const shown = below(document, []).filter(e => e.getBoundingClientRect().width > 0);
const own = e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join('');
return {
  texts: shown.map(own).filter(t => t),
  pictures: shown.filter(e => e.tagName === 'IMG' && e.naturalWidth > 100).length,
  curves: shown.filter(e => e.tagName === 'CANVAS' && e.getBoundingClientRect().width > 100).length
    + shown.filter(e => e.tagName === 'path' && (e.getAttribute('d') || '').length > 60).length,
  busy: shown.filter(e => /spinner/i.test(e.tagName)).length,
};
"""


def missing() -> str | None:
    """Return why no page can be opened here, None if one can."""
    absent = [name for name in (_CHROMIUM, _DRIVER) if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: chromium chromium-driver)"
    try:
        import PIL
        import selenium
    except ImportError as error:
        return f"not installed: {error.name} (pip install -e '.[test]')"
    return None if PIL and selenium else ""


@contextlib.contextmanager
def tensorboard(directory: Path) -> Iterator[str]:
    """Serve the runs below `directory`; yield the address."""
    words = ["-m", "tensorboard.main", "--logdir", str(directory), "--host=127.0.0.1", "--port=0"]
    server = subprocess.Popen(
        [sys.executable, *words, "--load_fast=false", "--reload_interval=5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                yield found[0]
                break
        else:
            raise RuntimeError("TensorBoard did not start: " + "".join(lines))
    finally:
        server.terminate()
        server.wait(30)


class Page:
    """A window of the browser."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def open(self, address: str) -> None:
        """Load another page."""
        self._driver.get("about:blank")  # TensorBoard takes a new #tab without loading
        self._driver.get(address)

    def content(self) -> dict[str, Any]:
        """Return the page's `texts`, and numbers of `pictures`, `curves` and `busy` spinners."""
        seen: dict[str, Any] = self._driver.execute_script(_PAGE_CONTENT)
        return seen

    def until(self, good: Callable[[dict[str, Any]], bool], timeout: float = 90) -> dict[str, Any]:
        """Wait until the page's content is `good` and return it.

        Raises:
            TimeoutError: it was not in time; the message holds the last content.
        """
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        seen: dict[str, Any] = {}

        def ready(_: Any) -> bool:
            seen.update(self.content())
            return good(seen)

        try:
            WebDriverWait(self._driver, timeout, 0.5).until(ready)
        except TimeoutException:
            raise TimeoutError(f"after {timeout} s the page shows {seen}") from None
        return seen

    def run(self, script: str) -> Any:
        """Run JavaScript and return its value."""
        return self._driver.execute_script(script)

    def save(self, file: Path) -> None:
        """Save a screenshot of the window."""
        self._driver.save_screenshot(str(file))


@contextlib.contextmanager
def page(width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Open a browser with a window of that many pixels."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which(_CHROMIUM) or ""
        for option in (*_OPTIONS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(option)
        service = webdriver.ChromeService(shutil.which(_DRIVER))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            yield Page(driver)
        finally:
            driver.quit()
