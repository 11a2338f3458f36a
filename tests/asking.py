"""One question to an engine, as tests put it: a subject, items, responses."""

from merge3.registration import Registration


def answers(engine, subject, items, **more):
    """A subject's responses to items. more: the registration's other fields."""
    (evaluation,) = engine.evaluate(Registration(tuple(items), **more), [subject])
    return evaluation.answers()
