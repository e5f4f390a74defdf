"""Data sets: downloading, reading, checking and loading labelled images."""
