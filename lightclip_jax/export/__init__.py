"""Trained towers written in formats that other runtimes read."""
