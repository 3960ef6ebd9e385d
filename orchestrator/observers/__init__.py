"""What watches a run: logs, metrics, traces, experiment loggers and notifications, one file each.

A run is one stream of events. An observer is called with each; it never stops or slows the run.
"""
