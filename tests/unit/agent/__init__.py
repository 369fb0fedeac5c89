"""Tests of what runs on a host."""
