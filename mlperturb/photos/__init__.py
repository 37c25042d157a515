"""Pixels in and out: photo files, regions, compressions, data sets."""
