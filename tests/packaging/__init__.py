"""Tests of the package as a whole: layers, public API, README, typing, compatibility."""
