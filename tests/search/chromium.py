"""Headless Chromium, driven through the pipe of its own debugging protocol: no driver, no port, no package."""
import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
# Without root's sandbox and a container's small /dev/shm Chromium does not start; the other flags keep it off the network.
FLAGS = ('--headless=new', '--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-default-apps', '--remote-debugging-pipe')


def program() -> str | None:
  """Where Chromium is."""
  return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
  """One tab. What goes wrong in it is collected: `errors` of the console, `requests` with their addresses."""

  def __init__(self, send: int, receive: int):
    self._send, self._receive, self._buffer, self._number = send, receive, b'', 0
    self.errors: list[str] = []
    self.requests: list[str] = []
    self._session = None
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Network', 'Log', 'DOM'):
      self.call(f'{domain}.enable')

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """The result of a command."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._send, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._message()
      if answer.get('id') == self._number:
        assert 'error' not in answer, (method, answer['error'])
        return answer['result']
      self._note(answer)

  def run(self, expression: str) -> Any:
    """The value of JavaScript, a promise's too."""
    done = self.call('Runtime.evaluate', expression=expression, awaitPromise=True, returnByValue=True)
    assert 'exceptionDetails' not in done, done['exceptionDetails']
    return done['result'].get('value')

  def open(self, url: str) -> None:
    self.call('Page.navigate', url=url)

  def wait(self, expression: str, seconds: float = 60) -> None:
    """Until JavaScript is true."""
    end = time.monotonic() + seconds
    while not self.run(f'(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()'):   # not loaded yet
      assert time.monotonic() < end, (expression, self.errors, self.run('document.body.innerText'))
      time.sleep(0.05)

  def give_files(self, selector: str, files: list[pathlib.Path]) -> None:
    """Chooses files, or a folder, in a file input."""
    root = self.call('DOM.getDocument')['root']['nodeId']
    node = self.call('DOM.querySelector', nodeId=root, selector=selector)['nodeId']
    self.call('DOM.setFileInputFiles', nodeId=node, files=[str(file) for file in files])

  def drop(self, path: pathlib.Path, x: int, y: int) -> None:
    """A file or a folder, from outside the browser."""
    data = {'items': [], 'files': [str(path)], 'dragOperationsMask': 1}
    for event in ('dragEnter', 'dragOver', 'drop'):
      self.call('Input.dispatchDragEvent', type=event, x=x, y=y, data=data)

  def type(self, text: str) -> None:
    """Into what has the focus."""
    self.call('Input.insertText', text=text)

  def press(self, key: str) -> None:
    code = {'Enter': 13, 'Escape': 27, 'ArrowDown': 40, 'ArrowRight': 39}[key]
    more = {'text': '\r'} if key == 'Enter' else {}
    self.call('Input.dispatchKeyEvent', type='keyDown', key=key, code=key, windowsVirtualKeyCode=code, **more)
    self.call('Input.dispatchKeyEvent', type='keyUp', key=key, code=key, windowsVirtualKeyCode=code)

  def screenshot(self, file: pathlib.Path, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
    self.resize(width, height, dark, scale)
    file.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', format='png')['data']))

  def resize(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=scale, mobile=width < 500)
    self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])

  def _message(self) -> dict[str, Any]:
    while b'\0' not in self._buffer:
      assert select.select([self._receive], [], [], 90)[0], 'Chromium does not answer'
      part = os.read(self._receive, 1 << 20)
      assert part, 'Chromium ended'
      self._buffer += part
    message, _, self._buffer = self._buffer.partition(b'\0')
    return json.loads(message)

  def _note(self, event: dict[str, Any]) -> None:
    method, params = event.get('method'), event.get('params', {})
    if method == 'Network.requestWillBeSent':
      self.requests.append(params['request']['url'])
    elif method == 'Runtime.exceptionThrown':
      self.errors.append(json.dumps(params['exceptionDetails'])[:2000])
    elif method == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(params['entry']['text'])
    elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'assert'):
      self.errors.append(json.dumps(params['args'])[:2000])


@contextlib.contextmanager
def open_page(profile: pathlib.Path, *more: str) -> Iterator[Page]:
  """A tab of a new browser, which ends with the block."""
  (their_in, send), (receive, their_out) = os.pipe(), os.pipe()

  # Chromium reads commands from 3 and writes answers to 4. A shell puts them there: Python code after a fork would make
  # JAX, whose threads may hold locks, warn.
  move = ['bash', '-c', f'exec "$@" 3<&{their_in} 4>&{their_out}', 'bash']
  command = [*move, program(), *FLAGS, *more, f'--user-data-dir={profile}', 'about:blank']
  process = subprocess.Popen(command, pass_fds=(their_in, their_out), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, env={**os.environ, 'HOME': str(profile)})
  os.close(their_in)
  os.close(their_out)
  try:
    yield Page(send, receive)
  finally:
    os.write(send, b'{"id": 0, "method": "Browser.close"}\0')
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    os.close(send)
    os.close(receive)
