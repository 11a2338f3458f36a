"""A LLaVA and its experts, trained here from scratch: the pictures of dots.py, questions in two languages.

A language model learns some of two languages. Eyes are trained in front of it, in English: that is the base. One expert
is the base, tuned on English questions about pictures. The other is the language model alone, tuned on Italian text: it
has never seen a picture. Which answers Italian questions about pictures? Neither, and a merge of both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from merge3.world.dots import CELL, CELLS, LANGUAGES, SIDE, WORDS, question, scene

SPECIAL = ["<pad>", "<s>", "</s>"]
IMAGE = "<image>"  # the last word, which the language model alone does not have
PLACES = CELLS * CELLS  # of an image among the tokens
STEPS = {"words": 300, "eyes": 300, "seeing": 200, "italian": 150}
RATES = {"words": 2e-3, "eyes": 2e-3, "seeing": 1e-3, "italian": 1e-3}
BATCH = 64
ITEMS = 400  # of every language
Line = tuple[list[int], list[int]]  # token ids: given, and to be said
