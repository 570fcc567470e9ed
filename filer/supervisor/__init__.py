"""Starts, watches, restarts and stops the processes of one node; see ``filer/node.py``."""
