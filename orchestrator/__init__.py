"""The shell: configuration, time, network, processes and people."""
