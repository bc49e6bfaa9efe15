"""Measurements: speed with the error next to it. Nothing here is a test."""
