"""How do I transfer files, and what does the receiver have when the sender fails in the middle?

Send files, many at once, and never take half a file for a whole one.

    python file_transfer.py

The script is the sender, and starts the receiver as a process. A file is a stream: its name, its bytes, and an end; the
answer is the digest of what arrived. There is an end only if the sender has made one. If it fails, `with stream:` is left
by an exception, which resets the stream; if it dies, the stream breaks. In both cases the receiver gets an error, not an
end of file, and throws away what it has.
"""

import contextlib
import errno
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path

import gevent
from gevent import subprocess

import geyamux
from geyamux.server import StreamServer

FILES = 20
CHUNK = 65536


def send(session, name, file):
    """Return when the receiver has all of it."""
    digest = hashlib.sha256()
    with session.open() as stream:
        stream.settimeout(30)
        stream.sendall(f"{name}\n".encode())
        while chunk := file.read(CHUNK):
            stream.sendall(chunk)
            digest.update(chunk)
        stream.close_write()
        if stream.read().decode() != digest.hexdigest():
            raise ConnectionError(f"{name} did not arrive as it was sent")


def receive(directory, stream):
    """Handle a stream. If this raises, the server resets it; a sender that is gone is no news to the server."""
    name = Path(stream.readline(256).decode().strip()).name  # whatever directories the sender would like
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".part", delete=False) as part:
        try:
            while chunk := stream.read1(CHUNK):
                part.write(chunk)
                digest.update(chunk)
        except BaseException:
            os.unlink(part.name)
            raise
    os.replace(part.name, directory / name)
    stream.sendall(digest.hexdigest().encode())


def receiver(directory):
    server = StreamServer(("127.0.0.1", 0), lambda stream, address: receive(Path(directory), stream))
    server.start()
    print(server.server_port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


class BrokenFile(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 300_000:
            raise OSError(errno.EIO, "the disk is broken")
        return super().read(size)


def demo(port, target):
    files = {f"file-{number}": os.urandom(50_000 * number) for number in range(FILES)}
    with geyamux.connect(("127.0.0.1", port), timeout=10) as session:
        sending = [gevent.spawn(send, session, name, io.BytesIO(data)) for name, data in files.items()]
        try:
            send(session, "broken", BrokenFile(bytes(1_000_000)))
        except OSError as error:
            print("one file could not be sent:", error.strerror)
        gevent.joinall(sending, raise_error=True)
    print(f"{FILES} others arrived:", all((target / name).read_bytes() == data for name, data in files.items()))
    print("the one is there:", (target / "broken").exists())


def main():
    with tempfile.TemporaryDirectory() as target:
        command = [sys.executable, __file__, "receiver", target]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            try:
                demo(int(process.stdout.readline()), Path(target))
            finally:
                process.terminate()


if __name__ == "__main__":
    if sys.argv[1:2] == ["receiver"]:
        receiver(sys.argv[2])
    else:
        main()
