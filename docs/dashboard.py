"""Make docs/dashboard.png: ``python docs/dashboard.py [file] [page ...]``.

Computes on the embedded AWS, and has Chromium, which has to be installed, look at the dashboard
meanwhile.  With several pages, each has its picture: ``file`` becomes ``file-page``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask.array as da
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.websocket import websocket_connect

from dask_lambda import LambdaClient

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--window-size=1280,760", "--remote-debugging-port=0", "about:blank"),
)
#: What a page takes to show itself, and to have something to show, in seconds.
PATIENCE = 8.0


def work(block: Any) -> Any:
    """Take some time."""
    time.sleep(0.2)
    return block


async def look(chromium: str, pictures: dict[str, Path]) -> None:
    """Take a picture of each page, by its address."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = await asyncio.create_subprocess_exec(
            chromium, *FLAGS, f"--user-data-dir={profile}", stderr=asyncio.subprocess.PIPE
        )
        try:
            assert browser.stderr is not None
            async for line in browser.stderr:
                if found := re.search(rb"DevTools listening on ws://([\d.:]+)/", line):
                    break
            else:
                sys.exit("Chromium has ended")
            address = found[1].decode()
            pages = [
                look_at(address, url, file, PATIENCE * (2 + i))
                for i, (url, file) in enumerate(pictures.items())
            ]
            await asyncio.gather(*pages)
        finally:
            browser.terminate()
            await browser.wait()


async def look_at(address: str, url: str, file: Path, patience: float) -> None:
    """Open a page, wait, and take its picture."""
    request = HTTPRequest(f"http://{address}/json/new?{url}", method="PUT", body=b"")
    target = json.loads((await AsyncHTTPClient().fetch(request)).body)
    page = await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=2**26)
    await asyncio.sleep(patience)
    await page.write_message(json.dumps({"id": 1, "method": "Page.captureScreenshot"}))
    while (message := json.loads(await page.read_message() or "{}")).get("id") != 1:
        pass
    file.write_bytes(base64.b64decode(message["result"]["data"]))


def main() -> None:
    """Compute, and take pictures."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("dashboard.png"))
    pages = sys.argv[2:] or ["status"]
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium is not installed")
    with LambdaClient(backend="local", dashboard_address="127.0.0.1:0") as client:
        base = client.dashboard_link.removesuffix("status")
        pictures = {f"{base}{page}": file for page in pages}
        if len(pages) > 1:
            pictures = {f"{base}{page}": file.with_stem(f"{file.stem}-{page}") for page in pages}
        warm_up = da.random.random((600, 600), chunks=(100, 100)).map_blocks(work)
        (warm_up @ warm_up.T).mean().compute()  # the first invocations import NumPy and Dask
        time.sleep(6)  # after which the task stream begins anew
        x = da.random.random((4_000, 4_000), chunks=(500, 500)).map_blocks(work)
        result = client.persist((x @ x.T).map_blocks(work).mean(axis=0))
        asyncio.run(look(chromium, pictures))
        print(*pictures.values())
        del result


if __name__ == "__main__":
    main()
