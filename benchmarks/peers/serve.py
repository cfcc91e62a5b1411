"""Runs one adapter: JSON lines in, JSON lines out. Standard library only, for any interpreter.

    python serve.py ADAPTER.py            answers requests
    python serve.py ADAPTER.py convert    converts the checkpoint of the options on stdin

``{"load": options}`` gives ``{"version": ...}``; ``{"generate": request}`` gives
``{"seconds": ..., "peak": bytes}``; what goes wrong gives ``{"error": ...}``. Whatever an engine
prints goes to stderr.
"""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import traceback


def read_peak():
    """Most bytes of memory that this process and its children had resident."""
    scale = 1 if sys.platform == "darwin" else 1024
    own, children = (
        scale * resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return max(own, children)


def reset_peak():
    """Forget the peak of loading and converting, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def serve(adapter, lines, out):
    """Answer every line."""
    peer = None
    for line in lines:
        message = json.loads(line)
        try:
            if "load" in message:
                convert(adapter, message["load"])
                peer = adapter.Peer(message["load"])
                reset_peak()
                reply = {"version": adapter.read_version()}
            else:
                seconds = peer.generate(message["generate"])
                peak = getattr(peer, "read_peak", read_current_peak)()
                reply = {"seconds": seconds, "peak": peak}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


def convert(adapter, options):
    """Convert the checkpoint in another process: that one's memory is not the engine's."""
    if hasattr(adapter, "convert"):
        command = [sys.executable, os.path.abspath(__file__), adapter.__file__, "convert"]
        subprocess.run(command, input=json.dumps(options), text=True, check=True)


def read_current_peak(process="self"):
    """Most bytes that a process had resident since the last reset."""
    try:
        with open(f"/proc/{process}/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return read_peak()
    return 1024 * int(line.split()[1])


def main():
    """Keep the real stdout for replies, and send everything else to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    path = os.path.abspath(sys.argv[1])
    folder = os.path.dirname(path)
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != folder]
    sys.path.append(folder)  # last: an adapter may have its engine's name
    spec = importlib.util.spec_from_file_location("adapter", path)
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    if sys.argv[2:] == ["convert"]:
        adapter.convert(json.load(sys.stdin))
    else:
        serve(adapter, sys.stdin, out)


if __name__ == "__main__":
    main()
