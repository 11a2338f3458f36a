"""Journals and pages to look at, for the tests of what looks on while a run goes on."""

import json
from contextlib import closing
from html.parser import HTMLParser

import numpy as np

from merge3.search.journal import Candidate, Journal


def candidate(number, values, stderrs=None, generation=None, objectives=("accuracy",), answers=3, error=None):
    """The number'th candidate of a search, two in a generation. values: None for one that failed."""
    failed = values is None
    values = np.full(len(objectives), np.nan) if failed else np.array(values, float)
    stderrs = np.full(len(objectives), np.nan) if failed else np.array(stderrs or [0.01] * len(values), float)
    responses = None if failed else np.ones(answers)
    at = number // 2 if generation is None else generation, number % 2
    return Candidate(*at, np.zeros(2), f"{number}", responses, objectives, values, stderrs, 0.5, 0.1, "local", error)


def journaled(directory, *candidates):
    """The directory, with these in its journal."""
    with closing(Journal(directory)) as journal:
        for one in candidates:
            journal.append(one)
    return directory


class Page(HTMLParser):
    """A page as a browser takes it apart: tags, the text of scripts, what it would ask a network for."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.asked, self.ids, self.text = [], [], [], set(), ""
        self._script = False
        self.feed(text)
        self.close()
        assert self.tags[-2:] == ["/body", "/html"], "not whole"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        of = dict(attributes)
        self.ids.add(of.get("id"))
        self.asked += [of[name] for name in ("src", "href") if name in of]
        if tag == "script":
            self._script = True
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")
        self._script = self._script and tag != "script"

    def handle_data(self, data):
        if self._script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self):
        """What is embedded in it."""
        _, data, _ = self.scripts  # the library, the data, what draws
        return json.loads(data, parse_constant=_refused)


def _refused(name):
    """No JSON that a browser reads has NaN in it."""
    raise AssertionError(f"{name} in a page's data")
