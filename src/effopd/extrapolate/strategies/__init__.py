"""All strategies of the package, one import per line, in the order of `--help`."""

# isort: off
from effopd.extrapolate.strategies import line_search as line_search
from effopd.extrapolate.strategies import newton_search as newton_search
from effopd.extrapolate.strategies import paper as paper
from effopd.extrapolate.strategies import noop as noop
from effopd.extrapolate.strategies import fixed as fixed
from effopd.extrapolate.strategies import random_direction as random_direction
from effopd.extrapolate.strategies import alpha_opd as alpha_opd
from effopd.extrapolate.strategies import relex as relex
