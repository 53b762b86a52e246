"""Synthetic workloads: arrival processes, lengths, shared prefixes, sessions, classes, clients."""

from llmsim.synth.clients import Client, mix
from llmsim.synth.workload import RequestClass, synthesise

__all__ = ["Client", "RequestClass", "mix", "synthesise"]
