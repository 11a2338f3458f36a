"""A search's page names who works for it on a daemon."""

import os

from merge3.client.channel import Target
from merge3.client.search_page import workers_of


def test_a_daemons_workers_are_named(daemon):
    (worker,) = workers_of(Target(daemon.address))
    assert worker["device"] == "cpu" and worker["pid"] == os.getpid() and worker["busy"] == "idle" and worker["name"]
