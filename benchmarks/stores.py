"""Reading parts from a store: whole, or in pieces side by side.

Run with `python -m benchmarks.stores`; it writes `results/stores.json`. A server on this machine answers after some latency and
sends so many bytes per second and connection, as object stores do (Amazon names 85 to 90 MB/s for a request to S3). Each row
reads parts of one length with one reader, or with several as LOADER_WORKERS has them; nothing is cached, digests are checked.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.server
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import lde
from pipeline.storage import stores
from pipeline.storage.stores import Store
from pipeline.system.files import sha256_bytes, write_json

RESULTS = Path(__file__).parent / "results" / "stores.json"
CHUNK = 64 * 1024


@contextlib.contextmanager
def server(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """A server of a folder's files: seconds until it answers, and bytes per second of a connection."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            began = time.monotonic() + latency
            time.sleep(latency)
            file = folder / self.path.lstrip("/")
            if not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, len(data))
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            for first in range(start, stop, CHUNK):
                self.wfile.write(data[first : min(first + CHUNK, stop)])
                time.sleep(max(began + (first - start) / rate - time.monotonic(), 0.0))

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def measure(lengths: list[int], readers: list[int], latency: float, rate: float) -> list[dict[str, Any]]:
    """Bytes per second, whole and in pieces."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, server(Path(folder), latency, rate) as url:
        for length, count in ((length, count) for length in lengths for count in readers):
            data = np.random.default_rng(length).bytes(length)
            sha = sha256_bytes(data)
            (Path(folder) / sha[:2]).mkdir(exist_ok=True)
            (Path(folder) / sha[:2] / sha).write_bytes(data)
            row: dict[str, Any] = {"MB": length / 1e6, "readers": count}
            piece = stores.PIECE_BYTES
            for name, stores.PIECE_BYTES in (("whole", length + 1), ("pieces", piece)):
                store = Store(url, Path(folder) / "cache", 0)
                with concurrent.futures.ThreadPoolExecutor(count) as pool:
                    began = time.monotonic()
                    for read in [pool.submit(store.get, "part", sha, length) for _ in range(count)]:
                        read.result()
                    row[f"{name}, MB/s"] = count * length / 1e6 / (time.monotonic() - began)
            stores.PIECE_BYTES = piece
            rows.append({**row, "times as fast": row["pieces, MB/s"] / row["whole, MB/s"]})
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4_000_000, 16_000_000, 50_000_000], help="bytes of a part")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--latency", type=float, default=0.05, help="seconds until the server answers")
    parser.add_argument("--rate", type=float, default=40e6, help="bytes per second of a connection")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    rows = measure(options.lengths, options.readers, options.latency, options.rate)
    lde.table(f"latency {options.latency:g} s, {options.rate / 1e6:g} MB/s of a connection", rows)
    conditions = {"latency": options.latency, "rate": options.rate, "piece_bytes": stores.PIECE_BYTES}
    write_json(options.output, {**conditions, "load_average": os.getloadavg()[0], "rows": rows})


if __name__ == "__main__":
    main()
