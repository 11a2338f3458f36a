"""Several candidates asked at one read of the models that they are merges of."""

from merge3.abreast.ask import Abreast
from merge3.abreast.course import Unfit
from merge3.abreast.groups import Groups

__all__ = ["Abreast", "Groups", "Unfit"]
