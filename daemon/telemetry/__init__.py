"""Logs and their redaction."""
