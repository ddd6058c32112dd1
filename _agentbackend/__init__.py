"""The parts of Agent Backend. The map of the house is the docstring of agentbackend.py, its door."""

VERSION = '1.0.0'
