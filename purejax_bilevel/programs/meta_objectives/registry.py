"""The agents of meta-training by name: the values of `--agent_type`."""

from purejax_bilevel.agents import Agents
from purejax_bilevel.programs.meta_objectives.agents import LPG, MetaAgent
from purejax_bilevel.programs.meta_objectives.groove import GROOVE
from purejax_bilevel.programs.meta_objectives.temporal import TA_LPG

AGENTS = Agents(MetaAgent, [LPG, GROOVE, TA_LPG])
