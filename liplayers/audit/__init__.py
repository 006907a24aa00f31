"""Attacks and searches that try to refute a certificate."""
