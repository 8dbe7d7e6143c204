"""How the tests compile: without XLA's fusion emitters, which halves the time that whole training programs take.

A flag that XLA does not know ends the process: this one is for the releases that it was tried with.
"""

from importlib.metadata import version

FLAGS = ("--xla_cpu_use_fusion_emitters=false",) if version("jaxlib").startswith("0.10.") else ()
# Compiler options of programs of different shapes that have to agree to the last bit, which they do with the emitters.
USUAL = {"xla_cpu_use_fusion_emitters": True} if FLAGS else {}
