"""Metrics and traces for other systems; each module needs an extra of the same name."""
