"""Optimizers as programs of a small language (arXiv 2302.06675)."""

from learned_opt.symbolic.program import Program, ProgramError, Statement, parse
from learned_opt.symbolic.programs import PROGRAMS
from learned_opt.symbolic.rule import EXAMPLES, Symbolic

__all__ = ["EXAMPLES", "PROGRAMS", "Program", "ProgramError", "Statement", "Symbolic", "parse"]
