"""Latency: what sites cost in measured milliseconds, and plans that deliver what is asked for."""

from secateur.latency.meeting import MetLatency, meet_latency
from secateur.latency.table import LatencyTable, latency_table

__all__ = ["LatencyTable", "MetLatency", "latency_table", "meet_latency"]
