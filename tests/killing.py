"""Searches in processes of their own that are killed with -9 while they are under way."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing


def evolving(config, directory, *options):
    """The command line of a search."""
    client = [sys.executable, "-m", "merge3.client"]
    return [*client, "evolve", str(config), "--run-dir", str(directory), "--quiet", *options]


def candidates(directory):
    """How many the journal has; 0 where there is none yet."""
    try:
        with closing(sqlite3.connect(f"file:{directory / 'run.db'}?mode=ro", uri=True)) as db:
            return db.execute("SELECT COUNT(*) FROM candidates").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def killed(config, directory, counts, whole, *options):
    """Run it, and kill -9 it whenever the journal has so many candidates; each time it goes on. whole: all that it
    would have, which it never reaches."""
    for stop_after in counts:
        extra = ["--resume"] if directory.exists() else []
        command = [*evolving(config, directory, *options), *extra]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None and candidates(directory) < stop_after:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert stop_after <= candidates(directory) < whole, process.stderr.read().decode()
