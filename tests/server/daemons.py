"""Real daemons on loopback: in a thread of this process or, where signals and kills are tested, in one of their own."""

import asyncio
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import grpc

from merge3.rpc import merge3_pb2_grpc
from merge3_server.daemon import serve
from merge3_server.logs import Formatter
from merge3_server.settings import Limits, Settings


class Daemon:
    """What it says, line by line, and how to call it. `lines`: what it said so far."""

    address = None

    def __init__(self):
        self.lines, self._heard = [], queue.Queue()

    def _hear(self, line):
        self.lines.append(line)
        self._heard.put(line)

    def wait_for(self, text, seconds=30):
        """The next line with this text, among those not waited for yet."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                line = self._heard.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                break
            if text in line:
                return line
        raise AssertionError(f"no {text!r} in:\n{''.join(self.lines[-30:])}")

    def stub(self, channel=None):
        return merge3_pb2_grpc.Merge3Stub(channel or grpc.insecure_channel(self.address))


class Process(Daemon):
    """`merge3-server serve` with some options."""

    def __init__(self, *options, env=None):
        super().__init__()
        command = [sys.executable, "-m", "merge3_server", "serve", *map(str, options)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {}),
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.address = self.wait_for("merge3-server listens on", 120).split(" on ")[1].split(", ")[0].strip()

    def _listen(self):
        for line in self.process.stdout:
            self._hear(line)
        self._heard.put(None)

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return self.process.wait(30)

    def stop(self, seconds=60):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


class Thread(Daemon):
    """The same server with these settings, in a thread and a loop of its own. Hears all that this process logs."""

    def __init__(self, *roots, listen="127.0.0.1:0", limits=None, **settings):
        super().__init__()
        self._log = _Log(self._hear)
        self._ready, self._failed = threading.Event(), None
        self.settings = Settings((listen,), tuple(roots), limits=Limits(**(limits or {})), **settings)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60), "".join(self.lines)
        if self._failed:
            raise self._failed

    def _run(self):
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._failed = error
        finally:
            self._heard.put(None)
            self._ready.set()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_shared_queue)
        await serve(self.settings, self._listens, self._watch)

    def _listens(self, addresses):
        (self.address,) = addresses
        self._ready.set()

    def _watch(self, stop):
        self._stop = stop

    def ask(self):
        """What a signal does to a process: the first lets calls under way finish, the second does not."""
        self._loop.call_soon_threadsafe(self._stop)

    def running(self):
        return self._thread.is_alive()

    def wait(self, seconds=60):
        """Until it has ended."""
        self._thread.join(seconds)
        assert not self.running(), "".join(self.lines[-30:])
        if self._failed:
            raise self._failed

    def stop(self, seconds=60):
        self.ask()
        self.wait(seconds)

    def kill(self):
        """End it without waiting for what is under way."""
        if self.running():
            self._loop.call_soon_threadsafe(lambda: (self._stop(), self._stop()))
            self.wait()
        self._log.close()


class _Log(logging.Handler):
    """Tells each line of the log, as `serve --verbose` prints it."""

    def __init__(self, hear):
        super().__init__()
        self._hear = hear
        self.setFormatter(Formatter(as_json=False))
        logger = logging.getLogger("merge3")
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self)

    def emit(self, record):
        self._hear(self.format(record) + "\n")

    def close(self):
        logging.getLogger("merge3").removeHandler(self)
        super().close()


def _shared_queue(loop, context):
    """Two loops with gRPC servers share a wake-up socket: the one that comes second finds nothing to read."""
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)
