"""Metrics and traces for other systems; each module needs the extra of its name."""
