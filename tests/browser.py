"""Headless browser for HTML pages, and JavaScript checks."""

import base64
import json
import os
import select
import subprocess
import time

# figure text that is clipped or overlaps, by bounding box
CLIPPED_OR_OVERLAPPING_TEXT = """
[...document.querySelectorAll('svg.figure')].flatMap(svg => {
  const frame = svg.getBoundingClientRect(), errors = []
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])
  texts.forEach(([text, box], i) => {
    if (Math.min(box.left - frame.left, frame.right - box.right, box.top - frame.top, frame.bottom - box.bottom) < -1)
      errors.push(svg.getAttribute('aria-label') + ': cut: ' + text)
    texts.slice(i + 1).forEach(([other, b]) => {
      const wide = Math.min(box.right, b.right) - Math.max(box.left, b.left)
      const high = Math.min(box.bottom, b.bottom) - Math.max(box.top, b.top)
      if (wide > 1 && high > 3) errors.push(svg.getAttribute('aria-label') + ': overlap: ' + text + ' / ' + other)
    })
  })
  return errors
})"""
MIN_FONT_SIZE = """
Math.min(...[...document.querySelectorAll('svg.figure')].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
  return [...svg.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize) * scale)
}))"""
CONTRAST = """
(() => {
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b }
  const ground = light(getComputedStyle(document.querySelector('section')).backgroundColor)
  return Math.min(...['h2', '.quiet', 'td', '.verdict.wrong', '.verdict.right', '.numbers dt', 'nav a'].map(s => {
    const ink = light(getComputedStyle(document.querySelector(s)).color)
    return (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05) }))
})()"""


class Browser:
    """Headless Chromium controlled through the DevTools pipe: file descriptors 3 and 4, NUL-terminated messages."""

    def __init__(self, program, profile):
        to_read, self._to_write = os.pipe()
        self._from_read, from_write = os.pipe()
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
        ]
        script = f'exec 3<&{to_read} 4>&{from_write}; exec "$0" "$@"'
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *flags],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        self._buffer = b""
        self._number = 0
        self._session = None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send a command and return its result; store events received in the meantime."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to_write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds=30.0):
        """Return the next message and add events to `events`."""
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from_read], [], [], max(end - time.monotonic(), 0))
            data = os.read(self._from_read, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError(f"Chromium sent no message for {seconds} s, exit status {self._process.poll()}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, path, width=1200, dark=False):
        """Load a page at a given width in light or dark mode."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        return self

    def evaluate(self, expression):
        """Evaluate a JavaScript expression in the page and return its JSON value."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def requested_urls(self):
        """Return the URLs of all requests of the page."""
        return [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]

    def issues(self):
        """Return console and log messages: errors, warnings, content policy violations and exceptions."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event["params"] for event in self.events if event["method"] in kinds]

    def screenshot(self, path, height=None):
        """Save a full-page screenshot as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        """Close the browser."""
        os.close(self._to_write)
        os.close(self._from_read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
