"""The command line: ``prunegate inspect|prune|export|bench|report``."""
