"""Tests of objects to bytes and back."""
