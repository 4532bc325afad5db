"""Acme AI's poller for tallyd."""
