"""What the adapters that run on torch have in common."""

import time

from PIL import Image


def open_pictures(request):
    """The request's pictures, decoded before any clock runs."""
    pictures = [Image.open(path).convert("RGB") for path in request["images"]]
    for picture in pictures:
        picture.load()
    return pictures


class Clock:
    """Seconds of a block; a device is waited for at both ends."""

    def __init__(self, wait=lambda: None):
        self.wait = wait

    def __enter__(self):
        self.wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.wait()
        self.seconds = time.perf_counter() - self.start
