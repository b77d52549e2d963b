"""What one server at the true shape computes once, as one line of JSON: sharing.py VISOR CHECKPOINT.

First tokens of a question about a picture in five crops, of a second question, and of the first in a new conversation; vision seconds
of the last; and the longest gap in a running stream while a picture of 2509 tokens is read, in slices of the configured length.
`visor bench --shape phi-3.5-vision` makes the checkpoint in its cache folder.
"""

import base64
import json
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

SLICE_S = 0.5


def png(width, height, seed):
    """Stripes of their own for each seed."""
    rows = b"".join(b"\0" + bytes((x * seed + y * 3) % 256 for x in range(width) for _ in range(3)) for y in range(height))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Server:
    def __init__(self, binary, checkpoint):
        self.folder = tempfile.TemporaryDirectory()
        config = f"[model]\nslice_ms = {int(1000 * SLICE_S)}\n[cache]\nresponses_mib = 0\n"
        pathlib.Path(self.folder.name, "visor.toml").write_text(config)
        command = [binary, "serve", "--listen", "127.0.0.1:0", "--config", "visor.toml", "--model", checkpoint]
        self.process = subprocess.Popen(command, cwd=self.folder.name, stderr=subprocess.PIPE, text=True)
        self.at = None
        for line in self.process.stderr:
            self.at = self.at or re.search(r"listening on (http://\S+)", line)
            if line.startswith("ready on"):
                break
        if self.at is None:
            sys.exit("the server did not start; is the second argument the folder of a checkpoint?")
        self.at = self.at.group(1)
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def stats(self):
        return json.load(urllib.request.urlopen(f"{self.at}/stats"))

    def tokens(self, messages, count, crops=4):
        """When each piece of a stream came, in seconds from the request."""
        body = {"messages": messages, "max_tokens": count, "stream": True, "temperature": 0, "num_crops": crops}
        request = urllib.request.Request(
            f"{self.at}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        start = time.perf_counter()
        for line in urllib.request.urlopen(request):
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                yield time.perf_counter() - start


def about(picture, question):
    image = {"type": "image_url", "image_url": {"url": picture}}
    return {"role": "user", "content": [image, {"type": "text", "text": question}]}


def longest_gap(server):
    times = []
    begun = threading.Event()

    def listen():
        for at in server.tokens([{"role": "user", "content": "Tell me a story."}], 400):
            times.append((time.perf_counter(), at))
            begun.set()

    listener = threading.Thread(target=listen)
    listener.start()
    begun.wait()
    asked = time.perf_counter()
    next(iter(server.tokens([about(png(1344, 1344, 11), "What is it?")], 1, crops=16)))
    read = time.perf_counter()
    listener.join()
    inside = [at for at, _ in times if asked <= at <= read]
    return max(b - a for a, b in zip(inside, inside[1:])), read - asked


server = Server(*(str(pathlib.Path(path).resolve()) for path in sys.argv[1:3]))
try:
    picture = png(1024, 768, 7)
    first = next(server.tokens([about(picture, "What is this?")], 1))
    second = next(server.tokens([about(picture, "Which colors does it have?")], 1))
    vision = lambda: server.stats()["stages"]["vision"]["seconds"]
    before = vision()
    system = {"role": "system", "content": "Be brief, and say nothing that you do not see."}
    fresh = next(server.tokens([system, about(picture, "What is this?")], 1))
    seen = vision() - before
    gap, read = longest_gap(server)
    print(
        json.dumps(
            {
                "first_token_s": first,
                "second_question": second / first,
                "new_conversation_s": fresh,
                "new_conversation_vision_s": seen,
                "gap_slices": gap / SLICE_S,
                "picture_of_2509_tokens_s": read,
            }
        )
    )
finally:
    server.process.terminate()
    server.process.wait()
