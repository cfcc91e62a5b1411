"""llama.cpp as a `llama-server` binary on the PATH, built for this processor."""

import json
import shutil
import socket
import subprocess
import time
import urllib.request

from asking_llama import check_counts, context_of, convert, make_body, vocabulary_of
from serve import read_current_peak

NAME = "llama_server"
INSTALL = "build llama.cpp, put its llama-server on the PATH, and pip install gguf numpy"
NEEDS = ("gguf", "numpy")
PROGRAMS = ("llama-server",)
NOTE = (
    "the text part only: as many prompt tokens, all of them text; no vision tower and no "
    "preprocessing (the converter refuses a bare CLIP tower)"
)
PATIENCE = 120


def read_version():
    """The engine's version."""
    command = [shutil.which("llama-server"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [x for x in (done.stderr + done.stdout).splitlines() if "version" in x]
    return f"llama.cpp {lines[0].strip()}" if lines else "llama.cpp"


class Peer:
    """A server in a process of its own, on this machine's loopback."""

    def __init__(self, options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.vocabulary = vocabulary_of(options)
        size = context_of(options)
        values = {
            "--model": convert(options),
            "--host": "127.0.0.1",
            "--port": port,
            "--ctx-size": size,
            "--batch-size": min(size, 2048),
            "--ubatch-size": min(size, 2048),
            "--parallel": 1,
            "--threads": options["threads"],
            "--cache-ram": 0,
        }
        words = [str(word) for pair in values.items() for word in pair]
        self.process = subprocess.Popen([shutil.which("llama-server"), *words])
        self.wait_until_ready()

    def wait_until_ready(self):
        """Ask for its health until it is well."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                    if reply.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError("llama-server did not get ready")

    def generate(self, request):
        """Seconds of a request."""
        data = json.dumps(make_body(request, self.vocabulary)).encode()
        header = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.url}/completion", data, header)
        start = time.perf_counter()
        with urllib.request.urlopen(asked) as reply:
            content = reply.read()
        seconds = time.perf_counter() - start
        answer = json.loads(content)
        check_counts(answer["tokens_predicted"], answer["tokens_evaluated"], request)
        return seconds

    def read_peak(self):
        """Most bytes that the server had resident."""
        return read_current_peak(self.process.pid)

    def __del__(self):
        process = getattr(self, "process", None)
        if process is not None:
            process.terminate()
            process.wait()
